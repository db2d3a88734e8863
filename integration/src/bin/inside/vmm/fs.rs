//! Directories of the host in the guest.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::tree;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        Test {
            name: "vmm.fs",
            proves: "a tree of 10,000 files (100 for every change) is the same on both sides whichever made it, each \
                 side sees what the other does, and a read-only share stays as it is",
            run,
            deadline: Duration::from_mins(45),
            rounds: Rounds::once_or(1),
            tags: &[],
        },
        Test {
            name: "vmm.fs-many",
            proves: "a guest may know more files of a share than a process may usually have open",
            run: many,
            deadline: Duration::from_mins(3),
            rounds: Rounds::once_or(3),
            tags: &[],
        },
    ]
}

/// More than the customary limit of 1024 descriptors: for each file a guest knows the monitor may hold one.
const MANY: usize = 1500;

fn many(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let shared = directory(ctx, "shared")?;
    for number in 0..MANY {
        fs::write(shared.join(number.to_string()), "x")?;
    }
    let guest = up(ctx, boot(ctx, "g").share("shared", &shared, false), &initrd_with_part(ctx)?)?;
    let script = "mkdir /a; mount -t virtiofs shared /a; cd /a; stat -c %s * | sort | uniq -c";
    let told = guest.sh(script, ctx.left().mul_f64(0.6))?;
    let expected = format!("{MANY} 1");
    ensure!(told.trim() == expected, "of {MANY} files of one byte the guest sees {told:?}");
    // Whoever exhausted something would show it here.
    guest.sh("echo still > /a/new; cat /a/7", A_MOMENT)?;
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

fn directory(ctx: &Ctx<'_, Inside>, name: &str) -> Result<PathBuf> {
    let path = ctx.path(name);
    fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let count = ctx.either(100, 10_000);
    let (shared, fixed) = (directory(ctx, "shared")?, directory(ctx, "fixed")?);
    fs::write(fixed.join("file"), "fixed")?;
    let machine =
        boot(ctx, "g").options(["--cpus", "2"]).share("shared", &shared, false).share("fixed", &fixed, true);
    let guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    guest.sh("mkdir /a /b; mount -t virtiofs shared /a; mount -t virtiofs fixed /b", A_MOMENT)?;
    let steps: [(&str, Step); 5] = [
        ("a tree made in the guest", |at| {
            fs::create_dir(at.shared.join("theirs"))?;
            tree_in_guest(at, "make", "theirs", 1)?;
            tree::check(&at.shared.join("theirs"), at.count, 1)
        }),
        ("a tree made on the host", |at| {
            fs::create_dir(at.shared.join("ours"))?;
            tree::make(&at.shared.join("ours"), at.count, 2)?;
            tree_in_guest(at, "check", "ours", 2)
        }),
        ("what the guest does", guests_doings),
        ("what the host does", hosts_doings),
        ("a read-only share", read_only),
    ];
    let left = ctx.left().mul_f64(0.8);
    let at = At { guest: &guest, shared: &shared, fixed: &fixed, count, within: left };
    for (name, step) in steps {
        let begun = Instant::now();
        step(&at).context(name)?;
        ctx.note(format!("{name}: {:.2} s", begun.elapsed().as_secs_f64()));
    }
    guest.sh("umount /a; umount /b", A_MOMENT)?;
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

/// What the steps work on: `shared` is `/a` in the guest, `fixed` is `/b`.
struct At<'a> {
    guest: &'a Guest,
    shared: &'a Path,
    fixed: &'a Path,
    count: u32,
    within: Duration,
}

type Step = fn(&At<'_>) -> Result<()>;

fn tree_in_guest(at: &At<'_>, verb: &str, name: &str, seed: u64) -> Result<()> {
    let count = at.count.to_string();
    let argv = ["guest-part", "tree", verb, &format!("/a/{name}"), &count, &seed.to_string()];
    let ran = at.guest.run(argv, at.within)?;
    ensure!(ran.code == 0, "in the guest: {ran}");
    Ok(())
}

fn guests_doings(at: &At<'_>) -> Result<()> {
    let path = |name: &str| at.shared.join(name);
    at.guest.sh(
        "cd /a; echo one > one; ln one two; mv one three; mkdir d; mv three d/; ln -s d/three s; mkfifo p; \
         chmod 4711 two; chown 1234:5678 two; touch -d '2001-02-03 04:05:06' two; \
         echo more >> two; truncate -s 100000 d/three; touch gone; rm gone",
        A_MOMENT,
    )?;
    let (two, three) = (fs::metadata(path("two"))?, fs::metadata(path("d/three"))?);
    ensure!(two.ino() == three.ino() && two.nlink() == 2, "two and d/three are not one file");
    ensure!(two.size() == 100_000, "it has {} bytes", two.size());
    ensure!((two.uid(), two.gid()) == (1234, 5678), "it is {}:{}'s", two.uid(), two.gid());
    ensure!(fs::read(path("two"))?.starts_with(b"one\nmore\n\0"), "its content is wrong");
    ensure!(fs::read_link(path("s"))? == Path::new("d/three"), "the link leads elsewhere");
    ensure!(!path("one").exists() && !path("gone").exists(), "what was moved or removed is there");
    // A file that was removed while it is open lives on, and its room is given back at the end.
    let mut holding = at.guest.begin(
        [
            "sh",
            "-ec",
            "exec 3<>/a/held; echo data >&3; rm /a/held; echo ready; read x; echo more >&3; \
                       cat /proc/self/fd/3; test ! -e /a/held",
        ],
        A_MOMENT,
    )?;
    holding.until_stdout_has("ready")?;
    ensure!(!path("held").exists(), "a removed file is there while it is open");
    holding.feed(b"go\n")?;
    let ran = holding.finish()?;
    ensure!(ran.code == 0 && ran.out().ends_with("data\nmore\n"), "the removed file: {ran}");
    Ok(())
}

fn hosts_doings(at: &At<'_>) -> Result<()> {
    let path = |name: &str| at.shared.join(name);
    fs::write(path("h1"), "written on the host\n")?;
    for name in ["w", "t", "r"] {
        fs::write(path(name), "some bytes")?;
    }
    let look = "ls /a/h1 /a/h2 /a/h3 2>/dev/null || true; cat /a/h[12] /a/w /a/t; stat -c %h /a/h[12]; ls /a/r 2>/dev/null || true";
    let before = at.guest.sh(look, A_MOMENT)?;
    ensure!(
        before == "/a/h1\nwritten on the host\nsome bytessome bytes1\n/a/r\n",
        "before the host did anything the guest sees {before:?}"
    );
    fs::rename(path("h1"), path("h2"))?;
    fs::hard_link(path("h2"), path("h3"))?;
    OpenOptions::new().write(true).open(path("w"))?.write_at(b"SOME", 0)?;
    OpenOptions::new().write(true).open(path("t"))?.set_len(4)?;
    fs::remove_file(path("r"))?;
    let after = "/a/h2\n/a/h3\nwritten on the host\nSOME bytessome2\n";
    // What a guest has looked at it may remember for seconds.
    until("the guest to see what the host did", Duration::from_secs(15), || {
        match at.guest.sh(look, A_MOMENT) {
            Ok(seen) if seen == after => Attempt::Done(()),
            Ok(seen) => Attempt::Pending(seen),
            Err(error) => Attempt::Pending(format!("{error:#}")),
        }
    })?;
    Ok(())
}

fn read_only(at: &At<'_>) -> Result<()> {
    for change in [
        "echo x > /b/file",
        "echo x > /b/new",
        "rm /b/file",
        "mkdir /b/d",
        "mv /b/file /b/other",
        "ln /b/file /b/link",
        "ln -s x /b/link",
        "chmod 0 /b/file",
        "chown 1 /b/file",
        "touch /b/file",
        "truncate -s 0 /b/file",
        "mount -o remount,rw /b; echo x > /b/new",
    ] {
        let ran = at.guest.run(["sh", "-c", change], A_MOMENT)?;
        ensure!(ran.code != 0, "`{change}` worked");
    }
    let names: Vec<_> = fs::read_dir(at.fixed)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names == ["file"], "the read-only share has {names:?}");
    ensure!(fs::read(at.fixed.join("file"))? == b"fixed", "the file in the read-only share has changed");
    ensure!(at.guest.sh("cat /b/file", A_MOMENT)? == "fixed", "the guest does not read what is there");
    Ok(())
}

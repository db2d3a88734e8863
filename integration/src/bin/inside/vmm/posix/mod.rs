//! A share beside the host's own file system: the same calls are made on both, and what comes of them compared.

mod known;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::{Ctx, Outcome, Rounds, Test};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;
use known::{DIFFERENCES, Difference, UNCACHED};

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.posix",
        proves: "file system calls do on a share what they do on the host, but for the differences that are known, \
             what they leave looks the same from both sides, and on a read-only share each is refused",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(3),
        tags: &[],
    }]
}

/// On a file system with a disk: what is mounted at `/tmp` may be one without.
const PLACE: &str = "/var/tmp";

/// A directory that goes with all that is in it.
struct Area(PathBuf);

impl Area {
    fn new() -> Result<Self> {
        let path = Path::new(PLACE).join(format!("posix-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        // Users other than root take part.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What else a guest may remember of a share, and what then is different besides.
const POLICIES: [(&str, &[Difference]); 2] = [("never", UNCACHED), ("always", &[])];

/// All that the guest mounts, by tag.
const TAGS: &str = "shared fixed joined never always";

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let area = Area::new()?;
    let (ours, shared, fixed) =
        (area.directory("ours")?, area.directory("shared")?, area.directory("fixed")?);
    let joined = Joined::new(area.directory("joined")?)?;
    on_host(ctx, "make-for-reading", &fixed)?;
    let before = on_host(ctx, "contents", &fixed)?;
    let mut machine = boot(ctx, "g")
        .share("shared", &shared, false)
        .share("fixed", &fixed, true)
        .share("joined", &joined.0, false);
    for (policy, _) in POLICIES {
        let directory = area.directory(policy)?;
        machine = machine.options(["--share", &format!("{policy}={}:cache={policy}", directory.display())]);
    }
    let guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    guest.sh(&format!("for tag in {TAGS}; do mkdir /$tag; mount -t virtiofs $tag /$tag; done"), A_MOMENT)?;
    let within = ctx.left().mul_f64(0.8);
    joined.check(&guest)?;
    apart(ctx, &guest, &shared)?;

    let host = on_host(ctx, "table", &ours)?;
    let share = in_guest(ctx, &guest, &["table", "/shared"], within)?;
    let mut complaints = compared(&host, &share, "", &[DIFFERENCES]);

    let theirs = in_guest(ctx, &guest, &["tree", "/shared"], within)?;
    complaints.extend(unlike("in the guest's eyes", &on_host(ctx, "tree", &shared)?, &theirs));
    let left = |directory| Ok::<_, anyhow::Error>(without_known(on_host(ctx, "contents", directory)?));
    complaints.extend(unlike("left by the guest", &left(&ours)?, &left(&shared)?));

    for (policy, also) in POLICIES {
        remembers(&guest, policy, &area.0.join(policy))?;
        // Mapped files are where it matters most.
        let family = ctx.either("map.", "");
        let share = in_guest(ctx, &guest, &["table", &format!("/{policy}"), family], within)?;
        let of_policy = compared(&host, &share, family, &[also, DIFFERENCES]);
        complaints.extend(of_policy.into_iter().map(|complaint| format!("with cache={policy}: {complaint}")));
    }

    complaints.extend(not_refused(&in_guest(ctx, &guest, &["read-only", "/fixed"], within)?, &UNASKED));
    guest.sh("mount -o remount,ro /fixed", A_MOMENT)?;
    complaints.extend(not_refused(&in_guest(ctx, &guest, &["read-only", "/fixed"], within)?, &[]));
    complaints.extend(unlike("on the read-only share", &before, &on_host(ctx, "contents", &fixed)?));

    for complaint in &complaints {
        ctx.note(complaint);
    }
    guest.sh(&format!("for tag in {TAGS}; do umount /$tag; done"), A_MOMENT)?;
    guest.ends_well()?;
    ensure!(complaints.is_empty(), "{} lines are wrong, first {}", complaints.len(), complaints[0]);
    Ok(Outcome::Passed)
}

/// Locks and sockets of the host mean nothing to the guest.
fn apart(ctx: &Ctx<'_, Inside>, guest: &Guest, shared: &Path) -> Result<()> {
    let (locked, socket) = (shared.join("locked"), shared.join("socket"));
    let lock = File::create(&locked)?;
    lock.lock()?;
    let listening = UnixListener::bind(&socket)?;
    let steps = "open 0 locked rw; flock 0 ex; connect socket";
    let told = in_guest(ctx, guest, &["try", "/shared", steps], A_MOMENT)?;
    let told = told.get("try").map(String::as_str);
    ensure!(told == Some("ok ok ECONNREFUSED"), "of the host's lock and socket the guest says {told:?}");
    drop((lock, listening));
    fs::remove_file(locked)?;
    fs::remove_file(socket)?;
    Ok(())
}

/// What the guest tells of a file that the host has changed since it looked. Reading would make it look again.
fn remembers(guest: &Guest, policy: &str, directory: &Path) -> Result<()> {
    let look = format!("stat -c %s /{policy}/seen");
    fs::write(directory.join("seen"), "one")?;
    ensure!(guest.sh(&look, A_MOMENT)? == "3\n", "with cache={policy} the guest does not see a file");
    fs::write(directory.join("seen"), "one and two")?;
    let told = guest.sh(&look, A_MOMENT)?;
    let expected = if policy == "never" { "11\n" } else { "3\n" };
    ensure!(told == expected, "with cache={policy} the guest says {told:?} of a file that the host changed");
    Ok(())
}

/// A directory in which another file system is mounted.
struct Joined(PathBuf);

impl Joined {
    fn new(path: PathBuf) -> Result<Self> {
        let inner = path.join("inner");
        fs::create_dir(&inner)?;
        mount(Some("tmpfs"), &inner, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting at {}", inner.display()))?;
        let joined = Self(path);
        fs::write(inner.join("file"), "inner")?;
        fs::write(joined.0.join("file"), "outer")?;
        Ok(joined)
    }

    /// The guest knows them for two.
    fn check(&self, guest: &Guest) -> Result<()> {
        let script = "cat /joined/inner/file /joined/file; test $(stat -c %d /joined) != $(stat -c %d /joined/inner/file); \
                      find /joined -xdev -name file; echo new > /joined/inner/new";
        let told = guest.sh(script, A_MOMENT)?;
        ensure!(told == "innerouter/joined/file\n", "of two file systems the guest says {told:?}");
        ensure!(fs::read(self.0.join("inner/new"))? == b"new\n", "what the guest wrote to the inner one");
        Ok(())
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("inner"), MntFlags::MNT_DETACH);
    }
}

/// Lines by what stands before their colon: a case or a path, and what is told of it.
type Told = BTreeMap<String, String>;

fn lines(text: &str) -> Told {
    let split = |line: &str| line.split_once(": ").map(|(name, told)| (name.to_owned(), told.to_owned()));
    text.lines().filter_map(split).collect()
}

fn on_host(ctx: &Ctx<'_, Inside>, verb: &str, directory: &Path) -> Result<Told> {
    let done = ctx.cmd(&ctx.world.guest_part).args(["posix", verb]).arg(directory).ok()?;
    Ok(lines(&done.out()))
}

fn in_guest(ctx: &Ctx<'_, Inside>, guest: &Guest, words: &[&str], within: Duration) -> Result<Told> {
    let begun = Instant::now();
    let ran = guest.run([&["guest-part", "posix"], words].concat(), within)?;
    ensure!(ran.code == 0, "in the guest: {ran}");
    let told = lines(&ran.out());
    ctx.note(format!("{words:?}: {} lines in {:.2} s", told.len(), begun.elapsed().as_secs_f64()));
    Ok(told)
}

/// Complaints about cases of a family: differences nobody knows of, and known ones that are none any more. Of what
/// is known of a case the first counts.
fn compared(host: &Told, share: &Told, family: &str, known: &[&[Difference]]) -> Vec<String> {
    let known = || known.iter().copied().flatten();
    let mut complaints = Vec::new();
    let of_family = |name: &&String| name.starts_with(family);
    let names: BTreeSet<&String> = host.keys().filter(of_family).chain(share.keys()).collect();
    let told = |all: &Told, name: &str| all.get(name).map_or("nothing", String::as_str).to_owned();
    for name in &names {
        let (host, share) = (told(host, name), told(share, name));
        match known().find(|difference| difference.case == *name) {
            None if host == share => {}
            None => complaints.push(format!("{name}: the host {host}, the share {share}")),
            Some(Difference { host: h, share: s, .. }) if (*h, *s) == (&host, &share) => {}
            Some(Difference { host: h, share: s, why, .. }) => complaints.push(format!(
                "{name}: the host {host}, the share {share}; known was the host {h}, the share {s} ({why})"
            )),
        }
    }
    let of_family = known().filter(|difference| difference.case.starts_with(family));
    let unheard = of_family.filter(|difference| !host.contains_key(difference.case));
    complaints.extend(unheard.map(|difference| format!("{}: there is no such case", difference.case)));
    complaints
}

/// What is left of a listing when the directories of cases that come out differently are taken away.
fn without_known(mut told: Told) -> Told {
    let case = |path: &str| path.split('/').nth(1).unwrap_or_default().to_owned();
    told.retain(|path, _| DIFFERENCES.iter().all(|difference| difference.case != case(path)));
    told
}

/// Complaints about what two listings do not have in common.
fn unlike(what: &str, one: &Told, other: &Told) -> Vec<String> {
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    names
        .into_iter()
        .filter(|name| one.get(*name) != other.get(*name))
        .map(|name| {
            let told = |all: &Told| all.get(name).map_or("nothing", String::as_str).to_owned();
            format!("{what}: {name}: the host {}, the other {}", told(one), told(other))
        })
        .collect()
}

/// What a guest that mounts the share for writing is not told before it tries: the question is not passed on for
/// what is no file, so the answer cannot be no for all.
const UNASKED: [&str; 2] = ["refused.access", "refused.access-directory"];

/// Complaints about calls that were not refused with EROFS, but for the `allowed`, and those of the others that were.
fn not_refused(told: &Told, allowed: &[&str]) -> Vec<String> {
    let is_wrong = |name: &str, outcome: &str| {
        if name.starts_with("refused.") && !allowed.contains(&name) {
            outcome != "EROFS"
        } else {
            outcome.split(' ').any(|word| word.starts_with('E'))
        }
    };
    let wrong = told.iter().filter(|(name, outcome)| is_wrong(name, outcome));
    wrong.map(|(name, outcome)| format!("on the read-only share: {name}: {outcome}")).collect()
}

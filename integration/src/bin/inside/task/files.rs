//! Directories, files and sockets of the host that a container sees, and file systems of its own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use integration::{Ctx, Outcome, Test, pattern, streams};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::{A_WHILE, OURS, Piped, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.binds",
            "directories and single files of the host, tmpfs and shared memory are as with runc, read-only ones too",
            binds,
        ),
        test(
            "task.last-writes",
            "what a process has written to a mapped file of a bind is there when it was killed and its container deleted, as with \
             runc",
            last_writes,
        ),
        test("task.swaps", "a ConfigMap that is swapped on the host is new at the next look", swaps),
        test("task.sockets", "a socket of the host in a bind is answered by who listens there", sockets),
    ]
}

/// Adds to the mounts of a configuration.
pub(super) fn add(spec: &mut Value, mounts: impl IntoIterator<Item = Value>) {
    if let Some(list) = spec["mounts"].as_array_mut() {
        list.extend(mounts);
    }
}

pub(super) fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({ "type": "bind", "source": source, "destination": destination, "options": options })
}

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({ "type": "tmpfs", "source": "tmpfs", "destination": destination, "options": options })
}

/// A file system of the host, as long as this value.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir_all(&at)?;
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a tmpfs at {}", at.display()))?;
        Ok(Self(at))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::empty()) {
            eprintln!("# unmounting {}: {error}", self.0.display());
        }
    }
}

/// Bytes that are written to a mapping.
const MAPPED: usize = 3 << 20;

fn last_writes(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for (seed, runtime) in [(1, RUNC), (2, OURS)] {
        let home = ctx.path(runtime);
        fs::create_dir_all(&home)?;
        let process = ["/part", "map", "/home/file", &seed.to_string(), &MAPPED.to_string()];
        let mut task = Piped::new(ctx, &api, runtime, &process, |spec| {
            let part = bind(&ctx.world.guest_part, "/part", &["bind", "ro"]);
            add(spec, [part, bind(&home, "/home", &["rbind", "rw"])]);
        })?;
        task.container.start()?;
        task.stdout.read_until("written\n", A_WHILE)?;
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let left = fs::read(home.join("file"))?;
        ensure!(left.len() == MAPPED, "{runtime}: the file has {} bytes", left.len());
        let wrong = pattern::wrong(seed, 0, &left);
        ensure!(wrong.is_none(), "{runtime}: the file is another from byte {wrong:?} on");
    }
    Ok(Outcome::Passed)
}

const LOOKS: &str = "exec 2>&1
pwd; cat /rw/a; echo guest >/rw/b; mv /rw/b /rw/c; ln /rw/c /rw/d; stat -c %h /rw/d; chmod 640 /rw/c; chown 7:8 /rw/c
echo x >/ro/x; (echo x >/ro/below/x) 2>/dev/null; cat /ro/a
echo x >/rro/x; echo x >/rro/below/x; cat /rro/below/a
cat /etc/single; echo more >>/etc/single; ls -a /etc | grep -c secret; echo x >/single-ro; cat /single-ro
stat -c %a /small; head -c 2097152 /dev/zero >/small/f; stat -c %s /small/f
df -k /dev/shm | awk 'END { print $2 }'; stat -c %a /dev/shm; echo x >/dev/shm/x; cat /dev/shm/x
touch /fresh/x; ls /fresh; grep -c ' /rw ' /proc/self/mounts";

fn binds(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let mut said = Vec::new();
    for (name, runtime) in [("runc", RUNC), ("ours", OURS)] {
        let home = ctx.path(name);
        for directory in ["rw", "ro"] {
            fs::create_dir_all(home.join(directory))?;
            fs::write(home.join(directory).join("a"), "of the host\n")?;
        }
        fs::write(home.join("single"), "single\n")?;
        fs::write(home.join("secret"), "secret\n")?;
        let below = Tmpfs::mount(home.join("ro/below"))?;
        fs::write(home.join("ro/below/a"), "below\n")?;
        let edit = |spec: &mut Value| {
            let shm = ["nosuid", "noexec", "nodev", "mode=1777", "size=4096k"];
            spec["process"]["cwd"] = json!("/rw/made/here");
            add(
                spec,
                [
                    bind(&home.join("rw"), "/rw", &["rbind", "rw"]),
                    bind(&home.join("ro"), "/ro", &["rbind", "ro"]),
                    bind(&home.join("ro"), "/rro", &["rbind", "rro"]),
                    bind(&home.join("single"), "/etc/single", &["bind"]),
                    bind(&home.join("single"), "/single-ro", &["bind", "ro"]),
                    tmpfs("/small", &["size=1m", "mode=1770"]),
                    tmpfs("/fresh", &[]),
                    json!({ "type": "tmpfs", "source": "shm", "destination": "/dev/shm", "options": shm }),
                ],
            );
        };
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", LOOKS], edit)?;
        task.container.start()?;
        let output = task.stdout.read_to_end(A_WHILE)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let read = |path: &str| fs::read_to_string(home.join(path)).with_context(|| path.to_owned());
        ensure!(read("rw/c")? == "guest\n" && read("rw/d")? == "guest\n", "{runtime}: /rw is not the host's");
        ensure!(home.join("rw/made/here").is_dir(), "{runtime}: the working directory is not in the bind");
        let mode = fs::metadata(home.join("rw/c"))?.permissions().mode() & 0o777;
        ensure!(mode == 0o640, "{runtime}: the mode is {mode:o}");
        ensure!(read("single")? == "single\nmore\n", "{runtime}: the single file is {:?}", read("single")?);
        ensure!(!home.join("ro/x").exists(), "{runtime}: what is read-only was written");
        // With runc, `ro` is about the one file system.
        ensure!(home.join("ro/below/x").exists() == (runtime == RUNC), "{runtime}: below what is read-only");
        drop(below);
        said.push(String::from_utf8_lossy(&output).into_owned());
    }
    ensure!(said[0] == said[1], "it says {:?}, with runc {:?}", said[1], said[0]);
    ensure!(said[0].matches("Read-only file system").count() == 4, "it says {:?}", said[0]);
    Ok(Outcome::Passed)
}

/// As the kubelet does: the names lead through one link, which is replaced at once.
pub(super) fn publish(home: &Path, version: &str, value: &str) -> Result<()> {
    fs::create_dir_all(home.join(version))?;
    fs::write(home.join(version).join("key"), value)?;
    let _ = fs::remove_file(home.join("..new"));
    symlink(version, home.join("..new"))?;
    fs::rename(home.join("..new"), home.join("..data"))?;
    if fs::symlink_metadata(home.join("key")).is_err() {
        symlink("..data/key", home.join("key"))?;
    }
    Ok(())
}

fn swaps(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let home = ctx.path("config");
    publish(&home, "..1", "value 1\n")?;
    let edit = |spec: &mut Value| add(spec, [bind(&home, "/config", &["rbind", "ro"])]);
    let script = "while read line; do cat /config/key; done";
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", script], edit)?;
    task.container.start()?;
    for number in 1..=ctx.either(20, 1000) {
        let value = format!("value {number}\n");
        if number > 1 {
            publish(&home, &format!("..{number}"), &value)?;
            fs::remove_dir_all(home.join(format!("..{}", number - 1)))?;
        }
        task.stdin.write(b"look\n")?;
        let seen = task.stdout.read_until("\n", A_WHILE)?;
        let seen = String::from_utf8_lossy(&seen);
        ensure!(seen == value, "after the swap to {value:?} it sees {seen:?}");
    }
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    Ok(Outcome::Passed)
}

fn sockets(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    const TIMES: usize = 3;
    let api = ctx.world.api()?;
    let program = ctx.path("guest-part");
    fs::copy(&ctx.world.guest_part, &program)?;
    for (name, runtime) in [("runc", RUNC), ("ours", OURS)] {
        let socket = ctx.path(name);
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666))?;
        let answering = thread::spawn(move || -> Result<()> {
            for _ in 0..TIMES {
                streams::answer(&listener.accept()?.0)?;
            }
            Ok(())
        });
        let edit = |spec: &mut Value| {
            add(
                spec,
                [bind(&program, "/guest-part", &["bind", "ro"]), bind(&socket, "/run.sock", &["bind"])],
            );
        };
        let script = "for n in 1 2 3; do /guest-part call-unix /run.sock $n 3000000 || exit; done; stat -c '%F %a' /run.sock";
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", script], edit)?;
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        let output = String::from_utf8_lossy(&task.stdout.read_to_end(A_WHILE)?).into_owned();
        let errors = String::from_utf8_lossy(&task.stderr.read_to_end(A_WHILE)?).into_owned();
        task.end(code)?;
        ensure!(code == 0 && output == "socket 666\n", "{runtime}: {code} {output:?} {errors:?}");
        answering.join().map_err(|_| anyhow!("the listener broke"))?.context("answering")?;
    }
    Ok(Outcome::Passed)
}

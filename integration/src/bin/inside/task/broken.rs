//! What cannot be done: the client is told why, and nothing is left of the attempt.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::command::Finished;
use integration::containerd::{NewContainer, Stdio};
use integration::{Ctx, Outcome, Test};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use serde_json::{Value, json};

use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test("task.broken", "a configuration that cannot be is refused, and says which part of it", broken),
        test(
            "task.options",
            "options of a runtime change its machines, those of another runtime do not, and mistakes in them are named",
            options,
        ),
        test("task.no-space", "where there is no space for a container its client is told", no_space),
        test(
            "task.unread",
            "a process whose output nobody reads stands still, and is killed and deleted as any other",
            unread,
        ),
        test("task.vanished", "a container whose files go away ends as any other", vanished),
    ]
}

type Edit = fn(&mut Value);

/// What is wrong, and the words of the refusal.
const BROKEN: &[(Edit, &[&str])] = &[
    (|spec| spec["process"]["args"] = json!([]), &["process.args"]),
    (|spec| spec["process"]["cwd"] = json!("relative"), &["process.cwd"]),
    (
        |spec| spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "nonsense" }]),
        &["namespaces"],
    ),
    (
        |spec| spec["mounts"] = json!([{ "destination": "/x", "type": "nfs", "source": "server:/" }]),
        &["mounts[0]"],
    ),
    (
        |spec| spec["mounts"] = json!([{ "destination": "/x", "type": "bind", "source": "/is/not/there" }]),
        &["mounts[0].source", "/is/not/there"],
    ),
    (
        |spec| {
            spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "pid" }, { "type": "ipc" }, { "type": "network", "path": "/proc/1/ns/net" }]);
        },
        &["network"],
    ),
    (|spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] }), &["/bin/false", "hook"]),
    (|spec| spec["linux"]["sysctl"] = json!({ "kernel.nonsense": "1" }), &["kernel.nonsense"]),
];

fn broken(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for (edit, words) in BROKEN {
        let refused = match Piped::new(ctx, &api, OURS, &["true"], edit) {
            Ok(task) => task.container.start().err(),
            Err(error) => Some(error),
        };
        let text = refused.map_or_else(|| "nothing".to_owned(), |error| format!("{error:#}"));
        ctx.note(&text);
        for word in *words {
            ensure!(text.contains(word), "{word:?} is missing in {text:?}");
        }
        ensure!(!text.contains("Unimplemented"), "{text}");
    }
    Ok(Outcome::Passed)
}

/// What is in a file of options, and what a container with them says; or the words of the refusal.
const OPTIONS: &[(&str, Result<&str, &str>)] = &[
    ("[vm]\ncpus = 2\n", Ok("2\n")),
    ("[vm]\nprocessors = 2\n", Err("`processors`")),
    ("[vm]\ncpus = \"two\"\n", Err("cpus = \"two\"")),
    ("[vm\n", Err("options.toml")),
];

fn options(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let (ctr, file) = (ctx.world.ctr(), ctx.path("options.toml"));
    let path = file.display().to_string();
    let run = |id: &str| -> Result<Finished> {
        let words =
            ["run", "--rm", "--runtime", OURS, "--runtime-config-path", &path, &ctr.image, id, "nproc"];
        ctx.world.with_container(id, || Ok(ctr.with(ctx.cmd("ctr"), words).run()?))
    };
    for (text, expected) in OPTIONS {
        fs::write(&file, text)?;
        let done = run(&new_id(ctx, OURS))?;
        match expected {
            Ok(says) => ensure!(done.out() == *says, "{text:?}: {:?} {:?}", done.out(), done.err()),
            Err(word) => {
                ensure!(done.code() != Some(0) && done.err().contains(word), "{text:?}: {:?}", done.err());
            }
        }
    }
    fs::remove_file(&file)?;
    let done = run(&new_id(ctx, OURS))?;
    ensure!(done.code() != Some(0) && done.err().contains(&path), "without a file: {:?}", done.err());
    // As docker and nerdctl give them to any runtime.
    let (api, id) = (ctx.world.api()?, new_id(ctx, OURS));
    let new = NewContainer { id: &id, image: &ctx.world.image, runtime: OURS, process: &["true"] };
    let mut container = api.create_through(&new, "no-such-runc")?;
    container.create_task(&Stdio { stdin: None, stdout: "/dev/null".into(), stderr: "/dev/null".into() })?;
    container.start()?;
    let code = container.wait(A_WHILE)?;
    container.delete_task()?;
    container.delete()?;
    ensure!(code == 0, "with runc's options: exit code {code}");
    Ok(Outcome::Passed)
}

/// A tmpfs over a directory of the shim's, which is too small.
pub(super) struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    pub(super) fn mount(at: &'a Path, data: &str) -> Result<Self> {
        fs::create_dir_all(at)?;
        mount(Some("small"), at, Some("tmpfs"), MsFlags::empty(), Some(data))
            .with_context(|| format!("mounting a small tmpfs at {}", at.display()))?;
        Ok(Self(at))
    }

    /// Fills it but for `left` bytes.
    pub(super) fn fill(&self, left: u64) -> Result<()> {
        let filler = File::create(self.0.join("filler.file"))?;
        let stat = statvfs(self.0)?;
        let free = stat.blocks_available() * stat.fragment_size();
        let len = free.checked_sub(left).with_context(|| format!("only {free} bytes are free"))?;
        Ok(fallocate(&filler, FallocateFlags::empty(), 0, len.try_into()?)?)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        // Whatever is still in use there is a leak, and found as one.
        if let Err(error) = umount2(self.0, MntFlags::MNT_DETACH) {
            eprintln!("# unmounting {}: {error}", self.0.display());
        }
    }
}

/// What there is below a shim's directory, but for what all shims have in common.
fn left_in(state: &Path) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let mut directories = vec![state.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)?.flatten() {
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                directories.push(path.clone());
            }
            left.push(path.strip_prefix(state)?.display().to_string());
        }
    }
    let common = ["containerd-version", "shims", "tasks", "machines", "shims/default", "tasks/default"];
    left.retain(|path| !common.contains(&path.as_str()));
    Ok(left)
}

fn no_space(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let state = Path::new("/run/supermachine");
    let existed = state.exists();
    // From nothing at all to almost enough.
    for inodes in [2, 4, 8, 12, 16, 20, 24] {
        let small = Small::mount(state, &format!("nr_inodes={inodes},size=1m"))?;
        let refused = match Piped::new(ctx, &api, OURS, &["true"], |_| {}) {
            Ok(task) => {
                task.container.start()?;
                let code = task.container.wait(A_WHILE)?;
                task.end(code)?;
                format!("nothing: {code}")
            }
            Err(error) => format!("{error:#}"),
        };
        ctx.note(format!("{inodes}: {refused}"));
        let left = left_in(state)?;
        drop(small);
        ensure!(
            refused.contains("No space left on device") || refused == "nothing: 0",
            "with {inodes} files it says {refused:?}"
        );
        ensure!(left.is_empty(), "with {inodes} files there is left {left:?}");
        ensure!(inodes > 8 || refused != "nothing: 0", "it did with {inodes} files");
    }
    if !existed {
        let _ = fs::remove_dir(state);
    }
    Ok(Outcome::Passed)
}

fn unread(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let script = "echo ready >&2; seq 1 10000000";
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", script], |_| {})?;
        task.container.start()?;
        task.stderr.read_until("ready", A_WHILE)?;
        let arguments = ["task", "exec", "--exec-id", "other", &task.id, "echo", "still here"];
        std::thread::sleep(Duration::from_secs(2));
        let other = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).ok()?;
        ensure!(other.out() == "still here\n", "{runtime}: another process says {:?}", other.out());
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 137, "{runtime}: exit code {code}");
        // Only now, so that nothing is read before it is deleted.
        let deleted = task.container.delete_task()?;
        ensure!(deleted == 137, "{runtime}: Delete says {deleted}");
        let output = task.stdout.read_to_end(A_WHILE)?;
        let text = String::from_utf8_lossy(&output);
        ensure!(text.starts_with("1\n2\n3\n"), "{runtime}: it begins with {:?}", super::head(&text));
        task.container.delete()?;
    }
    Ok(Outcome::Passed)
}

fn vanished(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let home = ctx.path("home");
    fs::create_dir_all(home.join("below"))?;
    fs::write(home.join("below/file"), "there\n")?;
    let edit = |spec: &mut Value| {
        spec["mounts"].as_array_mut().into_iter().for_each(|list| {
            list.push(
                json!({ "type": "bind", "source": home, "destination": "/home", "options": ["rbind"] }),
            );
        });
    };
    let script = "cat /home/below/file; read line; cat /home/below/file; touch /home/x; echo $?; exit 6";
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", script], edit)?;
    task.container.start()?;
    task.stdout.read_until("there\n", A_WHILE)?;
    fs::remove_dir_all(&home)?;
    task.stdin.write(b"go on\n")?;
    let code = task.container.wait(A_WHILE)?;
    let errors = String::from_utf8_lossy(&task.stderr.read_to_end(A_WHILE)?).into_owned();
    ensure!(code == 6 && errors.contains("No such file or directory"), "{code} {errors:?}");
    task.end(code)?;
    Ok(Outcome::Passed)
}

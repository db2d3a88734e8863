//! Machines that are restored from a template: as good as those that boot, each its own, and made again when the
//! template is not what it was.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use integration::containerd::Api;
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::ended::monitor_of;
use super::{A_WHILE, OURS, Piped, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test("task.template-same", "a restored container sees what one sees whose machine has booted", same),
        test(
            "task.template-clones",
            "two that are restored at once have random numbers, ids and addresses of their own",
            clones,
        ),
        test("task.template-sizes", "processors and memory are those that were asked for", sizes),
        test(
            "task.template-spoilt",
            "a template that is cut, changed or another's is made again, and the container runs all the same",
            spoilt,
        ),
        test(
            "task.template-ahead",
            "what the first machine of a template has used of its memory, the next has before it asks, and takes few exits for it",
            ahead,
        ),
        test("task.template-store", "an operator sees what there is, and the store keeps its limit", store),
    ]
}

/// A piece of configuration, until it is dropped.
pub(super) struct Configured(PathBuf);

impl Configured {
    pub(super) fn with(text: &str) -> Result<Self> {
        let directory = Path::new("/etc/supermachine/config.d");
        fs::create_dir_all(directory)?;
        // After that of the whole run.
        let path = directory.join("90-test.toml");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("# removing {}: {error}", self.0.display());
        }
    }
}

pub(super) fn annotate(spec: &mut Value, name: &str, value: &str) {
    spec["annotations"][format!("dev.supermachine.{name}")] = json!(value);
}

fn says(ctx: &Ctx<'_, Inside>, api: &Api, script: &str, edit: impl FnOnce(&mut Value)) -> Result<String> {
    let mut task = Piped::new(ctx, api, OURS, &["sh", "-c", script], edit)?;
    task.container.start()?;
    let code = task.container.wait(A_WHILE)?;
    let out = String::from_utf8_lossy(&task.stdout.read_to_end(A_WHILE)?).into_owned();
    ensure!(code == 0, "{script:?} ended with {code}: {out}");
    task.end(code)?;
    Ok(out)
}

/// Of which nothing depends on how the machine came to life.
const SAME: &str = "uname -srm; nproc; hostname; id; env | sort; ulimit -n; ls / /dev; wc -c < /proc/sys/kernel/random/boot_id
    cut -d' ' -f1-4 /proc/self/mountinfo | wc -l; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni
    grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /sys/devices/system/cpu/online";

fn same(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let _on = Configured::with("[vm]\nboot = \"restore\"\n")?;
    let mut told = Vec::new();
    for boot in ["restore", "cold"] {
        let edit = |spec: &mut Value| {
            spec["hostname"] = json!("of-its-own");
            annotate(spec, "boot", boot);
        };
        told.push(says(ctx, &api, SAME, edit)?);
    }
    ensure!(told[0] == told[1], "restored:\n{}\nbooted:\n{}", told[0], told[1]);
    // Its clock is the host's, whenever the template was made, and goes on.
    let script =
        "date +%s; read up rest < /proc/uptime; sleep 1; read later rest < /proc/uptime; echo $up $later";
    let before = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let out = says(ctx, &api, script, |_| {})?;
    let after = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut lines = out.lines();
    let date: u64 = lines.next().unwrap_or_default().parse().with_context(|| out.clone())?;
    ensure!((before - 1..=after + 1).contains(&date), "{date} is not from {before} to {after}");
    let up: Vec<f64> =
        lines.next().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
    ensure!(up.len() == 2 && (0.9..30.0).contains(&(up[1] - up[0])), "its uptime went from {up:?}");
    Ok(Outcome::Passed)
}

/// Each line of its own in each machine.
const OWN: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
    head -c 32 /dev/urandom | md5sum; head -c 32 /dev/random | md5sum
    for i in 1 2 3; do grep -F '[stack]' /proc/self/maps; grep -F '[vdso]' /proc/self/maps; done
    mktemp -u; md5sum </proc/self/auxv";

fn clones(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let _on = Configured::with("[vm]\nboot = \"restore\"\n")?;
    let told = std::thread::scope(|scope| {
        let one = || {
            let api = ctx.world.api()?;
            says(ctx, &api, OWN, |_| {})
        };
        let running = [scope.spawn(one), scope.spawn(one)];
        running.map(|one| one.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client broke"))))
    });
    let [first, second] = told;
    let (first, second) = (first?, second?);
    ctx.note(format!("{first}\n{second}"));
    ensure!(
        first.lines().count() == second.lines().count() && first.lines().count() >= 12,
        "{first}\n{second}"
    );
    for line in first.lines() {
        ensure!(!second.lines().any(|other| other == line), "both machines have {line:?}");
    }
    Ok(Outcome::Passed)
}

fn sizes(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let _on = Configured::with("[vm]\nboot = \"restore\"\nmemory = \"384MiB\"\nmax_memory = \"1GiB\"\n")?;
    let api = ctx.world.api()?;
    let script = "nproc; sed -n 's/^MemTotal: *//p' /proc/meminfo; cat /sys/devices/system/cpu/online";
    let all = std::thread::available_parallelism()?.get();
    for (cpus, memory, least, most) in [(1, 384, 256, 384), (all, 384, 256, 384), (1, 768, 600, 768)] {
        let out = says(ctx, &api, script, |spec| {
            annotate(spec, "cpus", &cpus.to_string());
            annotate(spec, "memory", &format!("{memory}MiB"));
        })?;
        ctx.note(format!("{cpus} and {memory} MiB: {out}"));
        let mut lines = out.lines();
        ensure!(lines.next() == Some(&cpus.to_string()), "{cpus} processors were asked for: {out}");
        let kib: u64 = lines
            .next()
            .and_then(|line| line.split(' ').next()?.parse().ok())
            .with_context(|| out.clone())?;
        ensure!((least..=most).contains(&(kib >> 10)), "{memory} MiB were asked for: {out}");
    }
    Ok(Outcome::Passed)
}

/// The only template of a store.
fn only(store: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(store)?.flatten().map(|entry| entry.path());
    let found: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    ensure!(found.len() == 1, "the store has {found:?}");
    Ok(found[0].clone())
}

type Harm = fn(&Path) -> Result<()>;

/// What happens to a template, and whether that is seen before a machine is restored: it is then made again for
/// this one, otherwise for the next.
const HARMS: [(&str, Harm, bool); 4] = [
    (
        "its memory is cut",
        |path| Ok(fs::OpenOptions::new().write(true).open(path.join("memory"))?.set_len(4096)?),
        true,
    ),
    ("its state is gone", |path| Ok(fs::remove_file(path.join("state"))?), true),
    (
        "its state is changed",
        |path| {
            let mut file = fs::OpenOptions::new().write(true).open(path.join("state"))?;
            file.seek(SeekFrom::Start(100))?;
            Ok(file.write_all(b"something else")?)
        },
        false,
    ),
    (
        "its state is of another kind",
        |path| {
            let length = fs::metadata(path.join("state"))?.len();
            Ok(fs::write(path.join("state"), vec![0; usize::try_from(length)?])?)
        },
        false,
    ),
];

fn spoilt(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let directory = ctx.path("templates");
    let _on = Configured::with(&format!(
        "[vm]\nboot = \"restore\"\n[template]\ndirectory = \"{}\"\n",
        directory.display()
    ))?;
    let api = ctx.world.api()?;
    let run = || says(ctx, &api, "echo well", |_| {});
    let verified = |path: &Path| {
        ctx.cmd("supermachine").args(["snapshot", "verify"]).arg(path).ok().context("verifying the template")
    };
    ensure!(run()? == "well\n");
    // What machines use first is a hint and no more.
    let hint = only(&directory)?.join("ahead");
    let length = fs::metadata(&hint).context("looking for the hint of what machines use first")?.len();
    ensure!(length > 12, "the hint has {length} bytes");
    fs::write(&hint, "nothing of the kind")?;
    ensure!(run()? == "well\n", "with a damaged hint the container did not run");
    // One of either kind for every change.
    for &(name, harm, seen) in ctx.either(&HARMS[1..3], &HARMS[..]) {
        ctx.note(name);
        harm(&only(&directory)?)?;
        ensure!(run()? == "well\n", "{name}: the container did not run");
        if !seen {
            ensure!(only(&directory).is_err(), "{name}: it is still there");
            ensure!(run()? == "well\n", "{name}: the next container did not run");
        }
        verified(&only(&directory)?).context(name)?;
    }
    // What somebody left who was killed is no template, and does not stay.
    let key = only(&directory)?.file_name().context("a name")?.to_string_lossy().into_owned();
    fs::rename(directory.join(&key), directory.join(format!("{key}.new")))?;
    ensure!(run()? == "well\n", "with what a killed maker left, the container did not run");
    verified(&only(&directory)?)?;
    Ok(Outcome::Passed)
}

/// How often a guest had to wait for a page of its memory until its container said something: as KVM has counted.
fn waits(ctx: &Ctx<'_, Inside>, api: &Api) -> Result<u64> {
    let mut task = Piped::new(ctx, api, OURS, &["sh", "-c", "echo up; exec sleep 1000"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("up", A_WHILE)?;
    let script = format!(
        "mount -t debugfs none /sys/kernel/debug && cat /sys/kernel/debug/kvm/{}-*/pf_taken",
        monitor_of(&task.id)?.pid
    );
    let counted = ctx.cmd("unshare").args(["--mount", "sh", "-c", &script]).ok()?;
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    counted.out().trim().parse().with_context(|| format!("KVM has counted {:?}", counted.out()))
}

fn ahead(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(Outcome::Skipped("only KVM of x86_64 maps what nobody has asked for".into()));
    }
    let directory = ctx.path("templates").display().to_string();
    let _on =
        Configured::with(&format!("[vm]\nboot = \"restore\"\n[template]\ndirectory = \"{directory}\"\n"))?;
    let api = ctx.world.api()?;
    let (first, next) = (waits(ctx, &api)?, waits(ctx, &api)?);
    ctx.note(format_args!("pages that the guest had to wait for: {first}, then {next}"));
    ensure!(first > 1000, "the first machine had to wait for {first} pages only: the test sees nothing");
    ensure!(next * 2 < first, "the first machine had to wait for {first} pages, and the next for {next}");
    Ok(Outcome::Passed)
}

fn store(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let directory = ctx.path("templates");
    let configure = |more: &str| {
        Configured::with(&format!(
            "[vm]\nboot = \"restore\"\n{more}\n[template]\ndirectory = \"{}\"\nmax_bytes = 1\n",
            directory.display()
        ))
    };
    let ask = |words: &[&str]| ctx.cmd("supermachine").args(words).ok();
    let listed =
        || -> Result<Vec<Value>> { Ok(serde_json::from_str(&ask(&["template", "ls", "--json"])?.out())?) };
    let on = configure("")?;
    ensure!(ask(&["check"])?.out().contains("none yet"), "check finds a template where there is none");
    ask(&["template", "build"])?;
    ensure!(ask(&["template", "build"])?.out().contains("there already"), "it was made twice");
    let first = only(&directory)?;
    ensure!(
        ask(&["check"])?.out().contains(&first.display().to_string()),
        "check does not find the template"
    );
    ensure!(listed()?.iter().all(|one| one["in_use"] == false && one["on_disk"].as_u64() > Some(1 << 20)));
    let told = ask(&["snapshot", "inspect", &first.display().to_string()])?;
    ensure!(told.out().contains("fs.containers") && told.out().contains("vsock"), "{}", told.out());
    ensure!(ask(&["snapshot", "ls"])?.out().contains(&first.display().to_string()));

    let api = ctx.world.api()?;
    let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo up; read line; echo $line"], |_| {})?;
    task.container.start()?;
    task.stdout.read_until("up", A_WHILE)?;
    let used = listed()?;
    ensure!(used.len() == 1 && used[0]["in_use"] == true && used[0]["machines"] == 1, "{used:?}");
    let timeline = ask(&["timeline", &task.id])?;
    ensure!(timeline.out().contains("restore") && !timeline.out().contains("kernel"), "{}", timeline.out());
    // It goes from under a machine that runs, which goes on.
    let key = first.file_name().context("a name")?.to_string_lossy().into_owned();
    ask(&["template", "rm", &key[..8]])?;
    ensure!(!first.exists());
    task.stdin.write(b"still here\n")?;
    let code = task.container.wait(A_WHILE)?;
    ensure!(code == 0 && task.stdout.read_until("still here", A_WHILE).is_ok(), "it ended with {code}");
    task.end(code)?;

    // Another shape has another one, and there is room for none but the last.
    ask(&["template", "build"])?;
    drop(on);
    let _on = configure("cpus = 1")?;
    ask(&["template", "build"])?;
    let last = only(&directory)?;
    ensure!(last != first, "two shapes have one template");
    ask(&["template", "prune"])?;
    ensure!(only(&directory).is_err(), "nothing was pruned");
    Ok(Outcome::Passed)
}

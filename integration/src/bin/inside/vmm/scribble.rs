//! Guests that do with their machine what no driver does.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration::command::Cmd;
use integration::guest::Guest;
use integration::wait::{Attempt, until, until_true};
use integration::{Ctx, Outcome, Rounds, Test, pattern, process};
use serde_json::json;

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;

/// Whatever its guest does, the monitor says within this time what the machine does.
const PROMPT: Duration = Duration::from_secs(2);
/// Between two looks at the monitor.
const PAUSE: Duration = Duration::from_millis(300);
/// What it may take of the host beyond guest RAM and what it took before.
const SPARE: u64 = 16 << 20;
/// Descriptors and threads beyond those of before: while streams are flooded, and while not. A stream is a
/// descriptor, and a guest may have 1024; the kernel adds threads to a process whose requests wait.
const STREAMS: usize = 1024 + 64 + 16;
const FEW: usize = 16;
const THREADS: usize = 32;
/// What the guest may send on a stream whose other end does not read, and the monitor keeps.
const CREDIT: u64 = 256 << 10;

/// Ports of the host: one where nobody listens, one where nobody takes what comes.
const NOBODY: u32 = 7000;
const DEAF: u32 = 7001;

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run, long| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(20),
        rounds: Rounds::once_or(long),
        tags: &[],
    };
    vec![
        test(
            "vmm.scribble",
            "a guest that writes garbage to every register, ring and port does not hurt its monitor, and after it \
             every device works",
            scribbled,
            10,
        ),
        test(
            "vmm.scribble-flood",
            "a guest that floods the host with streams costs it no more than its share",
            flooded,
            5,
        ),
        test(
            "vmm.scribble-wild",
            "a guest that writes anything anywhere under its own drivers harms nobody but itself",
            wild,
            10,
        ),
    ]
}

/// What a monitor takes of the host.
#[derive(Clone, Copy, Debug)]
struct Taken {
    bytes: u64,
    descriptors: usize,
    threads: usize,
}

impl Taken {
    fn by(guest: &Guest) -> Result<Self> {
        let proc = Path::new("/proc").join(guest.pid().to_string());
        let count = |what: &str| -> Result<usize> { Ok(fs::read_dir(proc.join(what))?.count()) };
        let stats = guest.drive()?.call(&json!("stats"))?;
        let bytes = stats.pointer("/stats/memory/monitor_private").and_then(serde_json::Value::as_u64);
        Ok(Self {
            bytes: bytes.with_context(|| format!("no memory in {stats}"))?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    fn ensure_within(&self, before: &Self, descriptors: usize) -> Result<()> {
        let streams = self.descriptors.saturating_sub(before.descriptors) as u64;
        ensure!(
            self.bytes <= before.bytes + SPARE + streams * CREDIT
                && self.descriptors <= before.descriptors + descriptors
                && self.threads <= before.threads + THREADS,
            "the monitor takes {self:?}, before {before:?}"
        );
        Ok(())
    }
}

/// That it says what the machine does, and soon.
fn answers(guest: &Guest) -> Result<()> {
    let begun = Instant::now();
    let state = guest.drive()?.call(&json!("state"))?;
    let took = begun.elapsed();
    ensure!(took < PROMPT, "to say that the machine is {state} took the monitor {:.2} s", took.as_secs_f64());
    ensure!(state["state"]["status"] == "running", "the machine is {state}");
    Ok(())
}

/// Its own threads have nothing to do any more.
fn settles(guest: &Guest) -> Result<()> {
    const LOOK: Duration = Duration::from_secs(1);
    let ticks = || -> Result<u64> {
        let threads = process::thread_ticks(guest.pid())?;
        Ok(threads.iter().filter(|((_, name), _)| !name.starts_with("vcpu")).map(|(_, ticks)| ticks).sum())
    };
    until("the monitor to settle", A_MOMENT, || {
        let spent = ticks().and_then(|before| {
            thread::sleep(LOOK);
            Ok(ticks()?.saturating_sub(before))
        });
        match spent {
            Ok(spent) if spent < 10 => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?} ticks a second")),
        }
    })?;
    Ok(())
}

/// Looks at the monitor until `over` says so.
fn watch(
    guest: &mut Guest,
    before: &Taken,
    descriptors: usize,
    within: Duration,
    mut over: impl FnMut(&Guest) -> bool,
) -> Result<()> {
    let begun = Instant::now();
    loop {
        ensure!(!guest.has_ended(), "the monitor has ended: {}", guest.stderr());
        answers(guest)?;
        Taken::by(guest)?.ensure_within(before, descriptors)?;
        if over(guest) {
            return Ok(());
        }
        ensure!(begun.elapsed() < within, "the guest is not done after {:.0} s", within.as_secs_f64());
        thread::sleep(PAUSE);
    }
}

/// Runs `command` in the guest apart from any stream, since there may be none meanwhile, and watches.
fn apart(ctx: &Ctx<'_, Inside>, guest: &mut Guest, before: &Taken, command: &str) -> Result<String> {
    // Nothing of the stream is left to it, or the stream would be there until it ends.
    let script = format!("set +e; {command} > /tmp/said 2>&1; echo \"code $?\" >> /tmp/said");
    let script = format!("rm -f /tmp/said; (sleep 0.5; {script}) < /dev/null > /dev/null 2>&1 &");
    guest.sh(&script, A_MOMENT)?;
    let mut said = String::new();
    let watched = watch(guest, before, FEW, ctx.either(A_MOMENT * 3, ctx.left().mul_f64(0.7)), |guest| {
        // Not traced: it mostly fails.
        let Ok(session) = guest.begin(["cat", "/tmp/said"], Duration::from_secs(2)) else { return false };
        said = session.finish().map(|ran| ran.out().into_owned()).unwrap_or_default();
        said.contains("code ")
    });
    watched.with_context(|| format!("while the guest runs {command}, which says {said:?}"))?;
    if !said.contains("code 0\n") {
        let kernel = guest.sh("dmesg | tail -n 5", A_MOMENT)?;
        bail!("in the guest {command} says {said}and the kernel {kernel}");
    }
    Ok(said)
}

/// A tap that no frame leaves: what the guest sends to it is garbage.
struct Tap(String);

impl Tap {
    fn make(ctx: &Ctx<'_, Inside>) -> Result<Self> {
        let tap = Self(format!("it{}", std::process::id()));
        ctx.cmd("ip").args(["tuntap", "add", "dev", &tap.0, "mode", "tap"]).ok()?;
        ctx.cmd("ip").args(["address", "add", "192.168.203.1/24", "dev", &tap.0]).ok()?;
        ctx.cmd("ip").args(["link", "set", "dev", &tap.0, "up"]).ok()?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = Cmd::new("ip", A_MOMENT).args(["link", "delete", "dev", &self.0]).ok() {
            eprintln!("{error}");
        }
    }
}

/// With one of each device.
fn machine(ctx: &Ctx<'_, Inside>, tap: &Tap) -> Result<Guest> {
    let (disk, share) = (ctx.path("disk"), ctx.path("share"));
    fs::write(&disk, pattern::bytes(1, 4 << 20))?;
    fs::create_dir(&share)?;
    let machine = boot(ctx, "g")
        .controlled()
        .options(["--cpus", "2", "--memory-max", "512M", "--tap", &tap.0])
        .block(&disk, false)
        .share("s", &share, false)
        .append("iomem=relaxed");
    up(ctx, machine, &initrd_with_part(ctx)?)
}

fn scribbled(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let tap = Tap::make(ctx)?;
    let mut guest = machine(ctx, &tap)?;
    works(ctx, &guest)?;
    let before = Taken::by(&guest)?;
    // 10,000 for each device in all rounds of a soak; each has numbers of its own.
    let (seed, rounds) = (u64::from(ctx.round), ctx.either(60, 300));
    let said = apart(ctx, &mut guest, &before, &format!("guest-part scribble {seed} {rounds}"))?;
    ctx.note(&said);
    // Of all that was tried, some must have been noticed.
    for kind in [1, 2, 4, 5, 19, 24, 26] {
        let line = said.lines().find(|line| line.starts_with(&format!("device {kind} ")));
        let line = line.with_context(|| format!("no device {kind} was scribbled on: {said}"))?;
        ensure!(!line.contains("broken after 0 "), "nothing was too much for {line}");
    }
    settles(&guest)?;
    until_true("descriptors and threads to go", A_MOMENT, || {
        Taken::by(&guest)
            .is_ok_and(|now| now.descriptors <= before.descriptors + 4 && now.threads <= before.threads + 4)
    })
    .with_context(|| format!("{:?}, before {before:?}", Taken::by(&guest)))?;
    works(ctx, &guest).context("after it")?;
    ctx.note(format!("{before:?} before, {:?} after", Taken::by(&guest)?));
    guest.power_off()?.expect_code(0)?;
    Ok(Outcome::Passed)
}

/// Every device does what it is for.
fn works(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<()> {
    guest.sh("dd if=/dev/hwrng of=/dev/null bs=1k count=1", A_MOMENT).context("rng")?;
    let script = "dd if=/dev/zero of=/dev/vda bs=64k count=8 conv=fsync; \
                  test $(dd if=/dev/vda bs=64k count=8 | tr -d '\\0' | wc -c) = 0";
    guest.sh(script, A_MOMENT).context("block")?;
    guest.sh("mkdir -p /s; mount -t virtiofs s /s; echo x > /s/x; umount /s", A_MOMENT).context("fs")?;
    ensure!(fs::read_to_string(ctx.path("share/x"))? == "x\n", "the share is not what the guest has written");
    let script =
        "ip link set eth0 up; ip address add 192.168.203.2/24 dev eth0; ping -c 1 -W 10 192.168.203.1";
    guest.sh(script, A_MOMENT).context("net")?;
    for size in ["512M", "256M"] {
        guest.ctl(["resize", "--memory", size])?;
        until_true("the guest to have what it was given", Duration::from_mins(2), || {
            guest.stats().is_ok_and(|stats| stats["ram"]["actual"] == stats["ram"]["requested"])
        })
        .context("mem")?;
    }
    guest.sh("ls /sys/bus/virtio/drivers/virtio_balloon | grep virtio", A_MOMENT).context("balloon")?;
    Ok(())
}

fn flooded(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = boot(ctx, "g").controlled().options(["--cpus", "2"]);
    let mut guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    let deaf = UnixListener::bind(guest.sockets().join(format!("vsock_{DEAF}")))?;
    let before = Taken::by(&guest)?;
    let seconds = ctx.either(5, 120);
    let words = ["guest-part", "flood", "8", &seconds.to_string(), &NOBODY.to_string(), &DEAF.to_string()];
    let flooding = guest.begin(words, ctx.left())?;
    let begun = Instant::now();
    watch(&mut guest, &before, STREAMS, ctx.left(), |_| begun.elapsed() > Duration::from_secs(seconds))?;
    let flooded = flooding.finish()?;
    ensure!(flooded.code == 0, "the flood: {flooded}");
    ctx.note(&flooded);
    drop(deaf);
    settles(&guest)?;
    until_true("streams to go", A_MOMENT, || {
        Taken::by(&guest).is_ok_and(|now| now.descriptors <= before.descriptors + 2)
    })?;
    Taken::by(&guest)?.ensure_within(&before, FEW)?;
    ensure!(guest.sh("echo alive", A_MOMENT)? == "alive\n", "the guest has other things to say");
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

fn wild(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    /// The monitor's exit codes for a guest that went on, that started anew, panicked, or crashed.
    const ENDS: [i32; 4] = [6, 3, 4, 5];
    let tap = Tap::make(ctx)?;
    let mut guest = machine(ctx, &tap)?;
    let before = Taken::by(&guest)?;
    let (seed, accesses) = (u64::from(ctx.round), ctx.either(20_000, 500_000));
    let script = format!(
        "(sleep 0.5; guest-part wild {seed} {accesses} > /dev/console 2>&1) < /dev/null > /dev/null 2>&1 &"
    );
    guest.sh(&script, A_MOMENT)?;
    let ends = Instant::now() + ctx.either(Duration::from_secs(8), Duration::from_secs(120));
    while Instant::now() < ends && !guest.has_ended() && !guest.console().contains("went wild") {
        // It may end while it is asked.
        let seen = answers(&guest).and_then(|()| Taken::by(&guest)?.ensure_within(&before, FEW));
        if let Err(error) = seen {
            ensure!(
                guest.has_ended() || until_true("its end", PROMPT, || guest.has_ended()).is_ok(),
                "{error:#}"
            );
        }
        thread::sleep(PAUSE);
    }
    if !guest.has_ended() {
        answers(&guest)?;
        settles(&guest)?;
        guest.ctl(["stop"])?;
    }
    let done = guest.wait()?;
    let code = done.code().unwrap_or(-1);
    ensure!(ENDS.contains(&code), "the monitor ended with {}: {}", done.status, done.err());
    ctx.note(format!("the monitor ended with {code}"));
    Ok(Outcome::Passed)
}

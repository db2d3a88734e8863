//! A machine driven by its control socket.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use integration::guest::control::{self, Control, FRAME_MAX};
use integration::guest::{Guest, Session};
use integration::wait::{Attempt, until, until_true};
use integration::{Ctx, Outcome, Rounds, Test, process};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

/// The monitor's exit codes for a machine that was stopped, and for one that was killed.
const STOPPED: i32 = 6;
const KILLED: i32 = 137;
/// Whatever clients do, the machine says within this time what it does.
const PROMPT: Duration = Duration::from_secs(2);
/// What is said on the console for its markers.
const MARKER: &str = "the machine is well";

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(10),
        tags: &[],
    };
    vec![
        test(
            "vmm.control",
            "a machine that is driven pauses, with not one instruction meanwhile, goes on, counts what it does, \
             shows its console, tells what happens, and stops",
            driven,
        ),
        test(
            "vmm.control-misuse",
            "who speaks another version, garbage, or without end to a control socket is sent away, and neither \
             machine nor others notice",
            misused,
        ),
        test(
            "vmm.control-owner",
            "a machine whose owner goes away stops, and one that is killed is gone at once",
            owned,
        ),
    ]
}

fn driven(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = boot(ctx, "g").controlled().options(["--cpus", "2", "--marker", MARKER]);
    let guest = up(ctx, machine, &initrd(ctx)?)?;
    ensure!(guest.ctl(["state"])? == "running\n", "a machine that runs says otherwise");
    let mut driver = guest.drive()?;
    let welcome = driver.welcome();
    ensure!(
        welcome["version"] == control::VERSION
            && welcome["pid"] == guest.pid()
            && welcome["status"] == "running",
        "the welcome is {welcome}"
    );
    driver.call(&json!("events"))?;
    stands_still(ctx, &guest)?;
    counts(&guest)?;
    console(&guest)?;
    resized(&guest)?;
    events(&mut driver)?;
    stopped(guest, driver)?;
    Ok(Outcome::Passed)
}

/// Lines with a number that grows, as fast as the guest can on both processors.
fn counting(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<Session> {
    let script = "for n in 1 2; do while :; do i=$((i+1)); echo $i > /tmp/count$n; done & done; \
                  echo counting; wait";
    let mut counting = guest.begin(["sh", "-c", script], ctx.left())?;
    counting.until_stdout_has("counting")?;
    Ok(counting)
}

fn numbers(guest: &Guest) -> Result<u64> {
    let text = guest.sh("cat /tmp/count1 /tmp/count2 /proc/uptime", A_MOMENT)?;
    Ok(text.lines().filter_map(|line| line.parse::<u64>().ok()).sum())
}

/// While it is paused nothing of the guest runs: its processors take no time, which they did before and do
/// after, and the guest's own clock has not gone on by as much as the host's.
fn stands_still(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<()> {
    const LONG: Duration = Duration::from_secs(2);
    let ticks = || -> Result<u64> {
        let threads = process::thread_ticks(guest.pid())?;
        Ok(threads.iter().filter(|((_, name), _)| name.starts_with("vcpu")).map(|(_, ticks)| ticks).sum())
    };
    let during = |time: Duration| -> Result<u64> {
        let before = ticks()?;
        std::thread::sleep(time);
        Ok(ticks()? - before)
    };
    let counting = counting(ctx, guest)?;
    let busy = during(LONG)?;
    ensure!(busy > 50, "a guest that is busy took {busy} ticks of two seconds");
    let first = numbers(guest)?;
    guest.ctl(["pause"])?;
    ensure!(guest.ctl(["state"])? == "paused\n", "a machine that was paused says otherwise");
    let look = guest.ctl(["look"])?;
    let program_counter = if cfg!(target_arch = "x86_64") { "rip=0x" } else { "pc=0x" };
    for start in ["vcpu 0 ", "vcpu 1 "].map(|vcpu| format!("{vcpu}{program_counter}")) {
        ensure!(look.lines().any(|line| line.starts_with(&start)), "no {start} in {look:?}");
    }
    // It has spoken to us, and what it offers is taken and given back one by one.
    let vsock = look.lines().find(|line| line.starts_with("vsock status 0xf, unheard "));
    let sent =
        vsock.and_then(|line| line.split_once("queue 1 ")?.1.split_once(',')).map(|(counts, _)| counts);
    let counts: Vec<_> =
        sent.into_iter().flat_map(|counts| counts.split('/')).map(str::parse::<u16>).collect();
    let right = matches!(counts[..], [Ok(offered), Ok(taken), Ok(given)] if offered >= taken && taken == given && given > 0);
    ensure!(right, "of the vsock device is to be seen {look:?}");
    let still = during(LONG)?;
    ensure!(still == 0, "a paused guest took {still} ticks, a busy one {busy}");
    let mut stream = UnixStream::connect(guest.sockets().join("vsock"))?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.write_all(format!("CONNECT {}\n", testbed::PORT).as_bytes())?;
    ensure!(stream.read(&mut [0]).is_err(), "a paused guest answers");
    drop(stream);
    guest.ctl(["resume"])?;
    ensure!(guest.ctl(["state"])? == "running\n", "a machine that goes on says otherwise");
    ensure!(guest.ctl(["look"]).is_err(), "a machine that runs is looked at");
    let second = until("the guest to go on", A_MOMENT, || match numbers(guest) {
        Ok(second) if second > first => Attempt::Done(second),
        other => Attempt::Pending(format!("{other:?} after {first}")),
    })?;
    let again = during(LONG)?;
    ensure!(again > 50, "a guest that was paused takes {again} ticks of two seconds, before {busy}");
    ctx.note(format!("{busy} ticks busy, {still} paused, {again} after; counted {first} and {second}"));
    drop(counting);
    Ok(())
}

fn counts(guest: &Guest) -> Result<()> {
    let count = |stats: &Value, pointer: &str| -> Result<u64> {
        stats.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {stats}"))
    };
    let before = guest.stats()?;
    // The serial port is an exit a byte; random bytes are requests of a device.
    guest.sh("echo counted > /dev/console; dd if=/dev/hwrng of=/dev/null bs=1k count=4", A_MOMENT)?;
    let after = guest.stats()?;
    let grows = |pointer: &str, least: u64| -> Result<()> {
        let (before, after) = (count(&before, pointer)?, count(&after, pointer)?);
        ensure!(after >= before + least, "{pointer} went from {before} to {after}");
        Ok(())
    };
    let exits = |stats: &Value, kind: &str| -> Result<u64> {
        (0..2).map(|vcpu| count(stats, &format!("/vcpus/{vcpu}/{kind}"))).sum()
    };
    let serial = if cfg!(target_arch = "x86_64") { "ports" } else { "memory" };
    let (first, second) = (exits(&before, serial)?, exits(&after, serial)?);
    ensure!(second >= first + 8, "eight bytes to the console were {first} to {second} exits");
    ensure!(exits(&after, "kicks")? > 0, "a pause came without a kick: {after}");
    for kind in ["memory", "ports", "calls", "unclaimed"] {
        exits(&after, kind)?;
    }
    ensure!(after["vcpus"].as_array().is_some_and(|vcpus| vcpus.len() == 2), "two processors: {after}");
    grows("/uptime_ms", 1)?;
    grows("/console/bytes", 8)?;
    let ids: Vec<&str> = after["devices"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|device| device["id"].as_str())
        .collect();
    ensure!(ids == ["rng", "balloon", "vsock"], "its devices are {ids:?}");
    grows("/devices/0/requests", 1)?;
    grows("/devices/0/written", 4096)?;
    grows("/devices/2/requests", 2)?;
    grows("/devices/2/interrupts", 1)?;
    // Neither the doorbell nor what a driver does when it is interrupted is an exit to the monitor.
    guest.sh("dd if=/dev/hwrng of=/dev/null bs=1k count=16", A_MOMENT)?;
    let later = guest.stats()?;
    let interrupts = count(&later, "/devices/0/interrupts")? - count(&after, "/devices/0/interrupts")?;
    let left = exits(&later, "memory")? - exits(&after, "memory")?;
    ensure!(
        interrupts >= 16 && left * 4 < interrupts,
        "{interrupts} interrupts took {left} exits to the monitor"
    );
    let memory = |what: &str| count(&after, &format!("/memory/{what}"));
    ensure!(memory("guest")? >= 256 << 20, "of 256 MiB the guest has {}", memory("guest")?);
    let resident = memory("guest_resident")?;
    ensure!((16 << 20..=memory("guest")?).contains(&resident), "resident are {resident} of the guest's");
    let monitor = memory("monitor_private")?;
    ensure!((1..64 << 20).contains(&monitor), "the monitor itself takes {monitor}");
    Ok(())
}

/// The log, and a conversation in both directions.
fn console(guest: &Guest) -> Result<()> {
    guest.sh("echo 'for the log' > /dev/console", A_MOMENT)?;
    until_true("the log to have it", A_MOMENT, || {
        guest.ctl(["log"]).is_ok_and(|log| log.contains("for the log"))
    })?;
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut driver = guest.drive()?;
    let done = driver.call_with(&json!({ "console_attach": { "replay": true } }), &[theirs.as_fd()])?;
    ensure!(done == "done", "the console was joined with {done}");
    drop(theirs);
    until_read(&mut ours, "for the log").context("the back-log")?;
    let mut reading = guest.begin(["sh", "-c", "echo ready; head -n 1 < /dev/console"], A_MOMENT)?;
    reading.until_stdout_has("ready")?;
    // A line may be typed before anybody reads it: the terminal keeps it.
    ours.write_all(b"typed by hand\n")?;
    let read = reading.finish()?;
    ensure!(read.out().contains("typed by hand"), "the guest has read {read}");
    guest.sh("echo 'from the guest' > /dev/console", A_MOMENT)?;
    until_read(&mut ours, "from the guest").context("what the guest printed")?;
    // Who leaves is let go, and the next is let in.
    drop(ours);
    let refused = driver.call(&json!({ "console_attach": { "replay": false } }));
    ensure!(refused.is_err(), "a console was joined to nothing");
    guest.sh("echo 'nobody listens' > /dev/console", A_MOMENT)?;
    Ok(())
}

/// Reads until `text` has come.
fn until_read(from: &mut UnixStream, text: &str) -> Result<()> {
    from.set_read_timeout(Some(A_MOMENT))?;
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while !integration::command::contains(&all, text.as_bytes()) {
        let count = from
            .read(&mut buffer)
            .with_context(|| format!("waiting for {text:?} after {:?}", String::from_utf8_lossy(&all)))?;
        ensure!(count > 0, "{text:?} did not come, but {:?}", String::from_utf8_lossy(&all));
        all.extend(&buffer[..count]);
    }
    Ok(())
}

/// What this machine cannot is refused by a reason, and nothing has changed.
fn resized(guest: &Guest) -> Result<()> {
    for (words, reason) in [
        (["--cpus", "4"], "processors"),
        (["--memory", "1G"], "memory_max"),
        (["--memory", "128M"], "balloon"),
    ] {
        let done = guest.try_ctl([&["resize"], &words[..]].concat())?.expect_code(1)?;
        ensure!(done.err().contains(reason), "{words:?} is refused without {reason:?}: {}", done.err());
    }
    guest.ctl(["resize", "--memory", "256M"])?;
    Ok(())
}

/// The pause of before, and what the guest prints now.
fn events(driver: &mut Control) -> Result<()> {
    let mut heard = Vec::new();
    let wanted = [json!({ "status": "paused" }), json!({ "status": "running" })];
    while !wanted.iter().all(|event| heard.contains(event)) {
        match driver.event(A_MOMENT)? {
            Some(event) => heard.push(event),
            None => bail!("of {wanted:?} only {heard:?} was heard"),
        }
    }
    let paused = heard.iter().position(|event| *event == wanted[0]);
    let resumed = heard.iter().rposition(|event| *event == wanted[1]);
    ensure!(paused < resumed, "out of order: {heard:?}");
    Ok(())
}

fn stopped(guest: Guest, mut driver: Control) -> Result<()> {
    guest.sh(&format!("echo 'now {MARKER}.' > /dev/console"), A_MOMENT)?;
    let marker = driver.event(A_MOMENT)?;
    ensure!(marker == Some(json!({ "marker": 0 })), "a marker was told as {marker:?}");
    guest.ctl(["stop"])?;
    let end = driver.event(A_MOMENT)?;
    ensure!(end == Some(json!({ "ended": "stopped" })), "a stop was told as {end:?}");
    let socket = guest.control_socket().to_owned();
    guest.wait()?.expect_code(STOPPED)?;
    ensure!(!socket.exists(), "{} is left", socket.display());
    Ok(())
}

/// What nobody should send.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let frame = |text: &str| [control::header(text.len(), 0), text.as_bytes().to_vec()].concat();
    let hello = frame(r#"{"versions":[1]}"#);
    let after = |bytes: Vec<u8>| [hello.clone(), bytes].concat();
    vec![
        ("another version", frame(r#"{"versions":[99]}"#)),
        ("no version", frame(r#"{"versions":[]}"#)),
        ("a call before the hello", frame(r#"{"id":1,"request":"stop"}"#)),
        ("text", b"GET / HTTP/1.1\r\nHost: machine\r\n\r\n".to_vec()),
        ("ones", vec![0xff; 64]),
        ("a frame that is too large", control::header(FRAME_MAX + 1, 0)),
        ("descriptors that do not come", control::header(2, 3)),
        ("too many descriptors", after(control::header(2, 17))),
        ("an unknown request", after(frame(r#"{"id":1,"request":"fly"}"#))),
        ("a request without a number", after(frame(r#"{"request":"stop"}"#))),
        ("a pause without end", after(frame(r#"{"id":1,"request":{"pause":{"within_ms":-1}}}"#))),
        ("no JSON", after(frame("{{{{"))),
        ("deep JSON", after(frame(&"[".repeat(100_000)))),
        ("a large frame of nothing", after([control::header(FRAME_MAX, 0), vec![0; FRAME_MAX]].concat())),
    ]
}

fn misused(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let guest = up(ctx, boot(ctx, "g").controlled(), &initrd(ctx)?)?;
    let fds = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", guest.pid()))?.count()) };
    let prompt = |what: &str| -> Result<()> {
        let begun = Instant::now();
        let mut driver = guest.drive()?;
        let state = driver.call(&json!("state"))?;
        let took = begun.elapsed();
        ensure!(took < PROMPT, "{what}: the state took {:.2} s", took.as_secs_f64());
        ensure!(state["state"]["status"] == "running", "{what}: the machine is {state}");
        Ok(())
    };
    let before = fds()?;
    for (what, bytes) in garbage() {
        let stream = UnixStream::connect(guest.control_socket())?;
        stream.set_write_timeout(Some(A_MOMENT))?;
        // It may be sent away amid its own words.
        let _ = (&stream).write_all(&bytes);
        sent_away(&stream).with_context(|| what.to_owned())?;
        prompt(what)?;
    }
    crowd(&guest, &prompt)?;
    until_true("descriptors to be closed", A_MOMENT, || fds().is_ok_and(|now| now <= before))?;
    // A descriptor that no request takes is no gift.
    let mut driver = guest.drive()?;
    driver.call_with(&json!("state"), &[std::io::stdin().as_fd()])?;
    let refused = driver
        .call_with(&json!({ "console_attach": { "replay": true } }), &[fs::File::open("/dev/null")?.as_fd()]);
    ensure!(refused.is_err(), "a console was joined to a file");
    let refused = driver.call(&json!({ "attach_tap": { "slot": "net.0" } }));
    ensure!(refused.is_err(), "a tap was attached without a tap");
    drop(driver);
    until_true("descriptors to be closed", A_MOMENT, || fds().is_ok_and(|now| now <= before))?;
    guest.sh("true", A_MOMENT)?;
    guest.power_off()?.expect_code(0)?;
    Ok(Outcome::Passed)
}

/// Reads to the end of the stream: at most a welcome and a goodbye with a reason.
fn sent_away(stream: &UnixStream) -> Result<()> {
    let mut said = Vec::new();
    loop {
        match control::receive(stream, A_MOMENT) {
            Ok(Some(message)) => said.push(message),
            Ok(None) => break,
            Err(error) => return Err(error.context(format!("nobody hung up after {said:?}"))),
        }
    }
    let refused = said.iter().any(|message| message["goodbye"]["why"].is_string());
    ensure!(refused && said.len() <= 2, "it was sent away with {said:?}");
    Ok(())
}

/// Many that say nothing or half a word keep nobody out for longer than a client may be silent.
fn crowd(guest: &Guest, prompt: &dyn Fn(&str) -> Result<()>) -> Result<()> {
    let crowd: Vec<_> = (0..7)
        .map(|number| -> Result<_> {
            let stream = UnixStream::connect(guest.control_socket())?;
            (&stream).write_all(&control::header(100, 0)[..number])?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    prompt("with others that are silent")?;
    // One that asks and never reads: its answers are kept up to a bound, and then it is not heard.
    let greedy = UnixStream::connect(guest.control_socket())?;
    control::send(&greedy, &json!({ "versions": [1] }), &[])?;
    greedy.set_nonblocking(true)?;
    let call = json!({ "id": 1, "request": "console_log" }).to_string();
    let call = [control::header(call.len(), 0), call.into_bytes()].concat();
    for _ in 0..20_000 {
        match (&greedy).write(&call) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Half of a call was taken before, so that the next begins amid nothing.
            Err(error) => bail!("the greedy one: {error}"),
        }
    }
    drop(crowd);
    prompt("with one that does not read")?;
    drop(greedy);
    prompt("after it")
}

fn owned(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd(ctx)?;
    let (ours, theirs) = UnixStream::pair()?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let machine = boot(ctx, "o").options(["--control".to_owned(), format!("fd:{}", theirs.as_raw_fd())]);
    // A monitor does not wait for its owner's first words for as long as a guest may take to boot.
    let owner = thread::spawn(move || Control::over(ours, A_MOMENT));
    let guest = up(ctx, machine, &initrd)?;
    drop(theirs);
    let mut owner = owner.join().map_err(|_| anyhow!("the owner's thread panicked"))??;
    ensure!(owner.call(&json!("state"))?["state"]["status"] == "running", "its owner cannot drive it");
    drop(owner);
    let begun = Instant::now();
    guest.wait()?.expect_code(STOPPED)?;
    ensure!(begun.elapsed() < A_MOMENT, "without its owner it went on for {:?}", begun.elapsed());

    let guest = up(ctx, boot(ctx, "k").controlled(), &initrd)?;
    guest.ctl(["pause"])?;
    guest.ctl(["kill"])?;
    guest.wait()?.expect_code(KILLED)?;
    Ok(Outcome::Passed)
}

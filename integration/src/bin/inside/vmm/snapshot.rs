//! Machines that are saved, and go on: here, again, and often.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration::guest::{Boot, Guest, Initrd};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;

/// Where the witness in the guest writes what it has seen.
const REPORT: &str = "/run/witness";
/// What a kernel says when it takes a pause for a fault of its own, or a processor for lost.
const COMPLAINTS: &str = "BUG:|soft lockup|rcu.*stall|rcu.*detected|clocksource.*unstable|hung task|Oops";

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(90),
        rounds: Rounds::once_or(1),
        tags: &[],
    };
    vec![
        test(
            "vmm.restore-2",
            "a machine with two processors goes on from its snapshot 3 times (500 in a soak): the clock is one on all \
             processors, timers fire, vector registers are intact, the kernel complains of nothing, no two draw the \
             same random numbers, and the one that was saved goes on too",
            |ctx| restored(ctx, 2, ctx.either(3, 500)),
        ),
        test("vmm.restore-4", "the same with four processors, twice (200 times in a soak)", |ctx| {
            restored(ctx, 4, ctx.either(2, 200))
        }),
        test(
            "vmm.resnapshot",
            "a machine that was restored and not run yet is saved as what it was restored from, but for what is told \
             to the guest",
            resnapshot,
        ),
        test(
            "vmm.reset",
            "a restored machine with a share and a disk is put back to its snapshot 3 times (200 in a soak): what it has \
             changed in its memory is undone, what was open is open, and it has what a restored one has",
            |ctx| goes_back(ctx, ctx.either(3, 200)),
        ),
        test(
            "vmm.snapshot-over",
            "a restored machine is saved with no more than it has changed, and that again 3 times (20 in a soak), each over \
             the same base; what is saved goes on when nothing else of it is left",
            |ctx| over(ctx, ctx.either(3, 20)),
        ),
        test(
            "vmm.snapshot-misuse",
            "a snapshot that is damaged, of another format, or given with other devices is refused in one line that \
             says why, and leaves nothing; one is not taken of a machine that runs, or into files with something in them",
            misuse,
        ),
    ]
}

/// Boots a machine with a witness in it, and saves it. The guest goes on.
fn saved(ctx: &Ctx<'_, Inside>, initrd: &Initrd, cpus: u32) -> Result<(Guest, PathBuf)> {
    saved_with(ctx, initrd, cpus, |machine| machine, "")
}

/// The same with a machine that is fitted with more, in which `script` is run first.
fn saved_with(
    ctx: &Ctx<'_, Inside>,
    initrd: &Initrd,
    cpus: u32,
    fit: impl Fn(Boot) -> Boot,
    script: &str,
) -> Result<(Guest, PathBuf)> {
    let options = ["--cpus".to_owned(), cpus.to_string()];
    let guest = up(ctx, fit(boot(ctx, "first").controlled().options(options)), initrd)?;
    guest.sh(script, A_MOMENT)?;
    let witness = format!("guest-part witness {cpus} {REPORT} >/dev/null 2>/run/witness-error </dev/null &");
    guest.sh(&witness, A_MOMENT)?;
    goes_on(&guest)?;
    let directory = ctx.path("snapshot");
    let begun = Instant::now();
    let said = guest.ctl(["snapshot".as_ref(), directory.as_os_str()])?;
    ctx.note(format!("saved in {:.2} s: {}", begun.elapsed().as_secs_f64(), said.trim()));
    Ok((guest, directory))
}

/// How many checks the witness has made, if none of them has failed.
fn checks(guest: &Guest) -> Result<u64> {
    let line = guest.sh(&format!("cat {REPORT} /run/witness-error"), A_MOMENT)?;
    let (checks, fault) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
    ensure!(fault.is_empty(), "the witness in the guest: {fault}");
    checks.parse().with_context(|| format!("the witness wrote {line:?}"))
}

/// The witness goes on, and all its threads do.
fn goes_on(guest: &Guest) -> Result<()> {
    let mut first = None;
    // Each thread makes a check in some milliseconds; that many are more than one thread's in this time.
    until("the witness to go on", A_MOMENT, || match checks(guest) {
        Ok(checks) => match first {
            None => {
                first = Some(checks);
                Attempt::Pending("it has just been asked".to_owned())
            }
            Some(first) if checks > first + 20 => Attempt::Done(Ok(())),
            Some(first) => Attempt::Pending(format!("{first} checks, then {checks}")),
        },
        Err(error) if format!("{error:#}").contains("No such file") => {
            Attempt::Pending("it starts".to_owned())
        }
        Err(error) => Attempt::Done(Err(error)),
    })?
}

/// The kernel has nothing to complain of.
fn quiet(guest: &Guest) -> Result<()> {
    let said = guest.sh(&format!("dmesg | grep -iE '{COMPLAINTS}' || true"), A_MOMENT)?;
    ensure!(said.is_empty(), "the guest's kernel says: {said}");
    Ok(())
}

fn restored(ctx: &mut Ctx<'_, Inside>, cpus: u32, times: u32) -> Result<Outcome> {
    let initrd = initrd_with_part(ctx)?;
    let (first, directory) = saved(ctx, &initrd, cpus)?;
    goes_on(&first).context("the one that was saved")?;
    let mut drawn = BTreeSet::new();
    let mut slowest = Duration::ZERO;
    for time in 0..times {
        let name = format!("r{time}");
        let machine = boot(ctx, &name).controlled().restore(&directory);
        let begun = Instant::now();
        let guest = machine.up(&initrd, A_MOMENT).with_context(|| format!("restore {time}"))?;
        let took = begun.elapsed();
        slowest = slowest.max(took);
        let mut checked = || -> Result<()> {
            for line in guest.sh(DRAW, A_MOMENT)?.lines() {
                ensure!(drawn.insert(line.trim().to_owned()), "{line} was drawn twice");
            }
            goes_on(&guest)?;
            quiet(&guest)
        };
        checked().with_context(|| format!("restore {time}"))?;
        if time == 0 {
            ctx.note(format!("the guest answers {:.3} s after its restore", took.as_secs_f64()));
            guest.ends_well()?;
        }
        for leaf in ["", ".control", ".jail"] {
            let _ = fs::remove_dir_all(ctx.path(&format!("{name}{leaf}")));
        }
    }
    ctx.note(format!("the slowest of {times} restores answered after {:.3} s", slowest.as_secs_f64()));
    goes_on(&first).context("the one that was saved")?;
    quiet(&first).context("the one that was saved")?;
    first.ends_well()?;
    Ok(Outcome::Passed)
}

/// What a guest draws that nobody else may draw.
const DRAW: &str = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";

/// A process with a file of the share open that was removed, and one that writes to another file of it.
const AT_WORK: &str = "mkdir /a; mount -t virtiofs shared /a
    sh -c 'echo kept >/a/removed; exec 3<>/a/removed; rm /a/removed; echo $$ >/run/holder; exec sleep 100000' \
        >/dev/null 2>&1 </dev/null &
    sh -c 'while sleep 0.1; do echo $((beats += 1)) >/a/beats; done' >/dev/null 2>&1 </dev/null &
    until [ -e /run/holder ]; do sleep 0.1; done; head -c 4096 /dev/vda | cmp - /a/disk";

/// Finds everything as it was, and leaves nothing as it is.
const FOUND_AND_LEFT: &str =
    "test ! -e /run/mark; : >/run/mark; head -c 4000000 /dev/zero | tr '\\0' x >/run/filled
    open=/proc/$(cat /run/holder)/fd/3; test \"$(cat $open)\" = kept; echo spoilt >$open
    echo 3 >/proc/sys/vm/drop_caches; head -c 4096 /dev/vda | cmp - /a/disk";

fn goes_back(ctx: &mut Ctx<'_, Inside>, times: u32) -> Result<Outcome> {
    let initrd = initrd_with_part(ctx)?;
    let (shared, disk) = (ctx.path("shared"), ctx.path("disk"));
    fs::create_dir(&shared)?;
    let content: Vec<u8> = (0..1u32 << 20).map(|at| (at / 7) as u8).collect();
    fs::write(&disk, &content)?;
    fs::write(shared.join("disk"), &content[..4096])?;
    let fit = |machine: Boot| machine.share("shared", &shared, false).block(&disk, true);
    let (first, directory) = saved_with(ctx, &initrd, 2, fit, AT_WORK)?;
    let over = first.try_ctl(["reset"])?;
    ensure!(over.code() == Some(1) && over.err().contains("booted"), "reset after a boot: {}", over.err());
    drop(first);
    let mut guest = fit(boot(ctx, "again").controlled()).restore(&directory).up(&initrd, A_MOMENT)?;
    let (mut drawn, mut slowest) = (BTreeSet::new(), Duration::ZERO);
    for time in 0..=times {
        let mut found = || -> Result<()> {
            for line in guest.sh(DRAW, A_MOMENT)?.lines() {
                ensure!(drawn.insert(line.trim().to_owned()), "{line} was drawn twice");
            }
            guest.sh(FOUND_AND_LEFT, 4 * A_MOMENT)?;
            goes_on(&guest)?;
            quiet(&guest)?;
            fs::remove_file(shared.join("beats"))?;
            until("the other process to go on", A_MOMENT, || {
                if shared.join("beats").exists() {
                    Attempt::Done(())
                } else {
                    Attempt::Pending("it writes nothing".to_owned())
                }
            })?;
            Ok(())
        };
        found().with_context(|| format!("after {time} resets"))?;
        if time < times {
            guest.ctl(["pause"])?;
            let begun = Instant::now();
            guest.ctl(["reset"]).with_context(|| format!("reset {time}"))?;
            slowest = slowest.max(begun.elapsed());
            guest.ctl(["resume"])?;
            guest.until_ready(A_MOMENT).with_context(|| format!("reset {time}"))?;
        }
    }
    ctx.note(format!("the slowest of {times} resets took {:.3} s", slowest.as_secs_f64()));
    let refused = guest.try_ctl(["reset"])?;
    ensure!(refused.code() == Some(1) && refused.err().contains("running"), "{}", refused.err());
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

/// Of the RAM's file of a snapshot, what is in it.
fn data(ctx: &Ctx<'_, Inside>, directory: &Path) -> Result<u64> {
    let told = ctx
        .cmd(&ctx.world.vmm)
        .args(["inspect".as_ref(), "--verify".as_ref(), directory.as_os_str()])
        .ok()?;
    let told: serde_json::Value = serde_json::from_str(&told.out()).context("reading what a snapshot is")?;
    told["ram_data"].as_u64().context("a snapshot without RAM")
}

fn over(ctx: &mut Ctx<'_, Inside>, times: u32) -> Result<Outcome> {
    let initrd = initrd_with_part(ctx)?;
    let (first, mut below) = saved(ctx, &initrd, 2)?;
    drop(first);
    let all = data(ctx, &below)?;
    for time in 0..times {
        let place = |leaf: &str| ctx.path(&format!("r{time}{leaf}"));
        let guest = boot(ctx, &format!("r{time}")).controlled().restore(&below).up(&initrd, A_MOMENT)?;
        let marks = guest.sh("cat /run/marks 2>/dev/null || true", A_MOMENT)?;
        ensure!(marks.lines().eq((0..time).map(|time| time.to_string())), "of {time} marks it has {marks:?}");
        guest.sh(&format!("echo {time} >>/run/marks; head -c 3000000 /dev/urandom >/run/drawn"), A_MOMENT)?;
        goes_on(&guest).with_context(|| format!("restore {time}"))?;
        quiet(&guest)?;
        let above = place(".over");
        guest.ctl(["snapshot".as_ref(), above.as_os_str(), "--over".as_ref(), below.as_os_str()])?;
        goes_on(&guest).context("the one that was saved")?;
        guest.ends_well()?;
        let own = data(ctx, &above)?;
        ctx.note(format!("of {} MiB of RAM {} are its own", all >> 20, own >> 20));
        ensure!(own > 3_000_000, "what it has drawn is not among its {own} bytes");
        ensure!(own < all, "it has all {all} bytes, and {own} over them");
        fs::remove_dir_all(&below)?;
        for leaf in ["", ".control", ".jail"] {
            fs::remove_dir_all(place(leaf))?;
        }
        below = above;
    }
    Ok(Outcome::Passed)
}

/// Where two texts differ: each line with the names of what is around it, the line before it, and both versions.
fn differences(one: &str, other: &str) -> Vec<String> {
    if one.lines().count() != other.lines().count() {
        return vec![format!("{} lines and {}", one.lines().count(), other.lines().count())];
    }
    let (mut around, mut found, mut before): (Vec<(usize, &str)>, _, _) = (Vec::new(), Vec::new(), "");
    for (line, changed) in one.lines().zip(other.lines()) {
        let depth = line.len() - line.trim_start().len();
        around.retain(|(other, _)| *other < depth);
        let text = line.trim();
        if line != changed {
            let path: Vec<&str> = around.iter().map(|(_, name)| *name).collect();
            found.push(format!("{} | {before} | {text} -> {}", path.join(" "), changed.trim()));
        }
        if text.ends_with(['{', '[', '(']) {
            around.push((depth, text.trim_end_matches(['{', '[', '(', ' ', ':'])));
        }
        before = text;
    }
    found
}

fn resnapshot(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd_with_part(ctx)?;
    let (first, directory) = saved(ctx, &initrd, 2)?;
    drop(first);
    let machine = boot(ctx, "again").controlled().restore(&directory).options(["--paused"]);
    let again = machine.start(&initrd)?;
    until("its control socket", A_MOMENT, || match again.ctl(["state"]) {
        Ok(state) => Attempt::Done(state),
        Err(error) => Attempt::Pending(format!("{error:#}")),
    })?;
    let second = ctx.path("second");
    again.ctl(["snapshot".as_ref(), second.as_os_str()])?;
    let told = |directory: &Path| -> Result<String> {
        let arguments = ["inspect".as_ref(), "--all".as_ref(), directory.as_os_str()];
        Ok(ctx.cmd(&ctx.world.vmm).args(arguments).ok()?.out().into_owned())
    };
    let differ = differences(&told(&directory)?, &told(&second)?);
    let expected = |line: &&String| EXPECTED.iter().any(|known| line.contains(known)) || is_told(line);
    let unexpected: Vec<_> = differ.iter().filter(|line| !expected(line)).collect();
    ctx.note(format!("{} lines differ", differ.len()));
    ensure!(unexpected.is_empty(), "what was not expected to differ: {unexpected:#?}");
    ensure!(again.ctl(["resume"]).is_ok(), "it does not go on");
    Ok(Outcome::Passed)
}

/// What a restore changes, by words that are in a line of [`differences`].
const EXPECTED: &[&str] = &[
    // When it was taken.
    "\"created\"",
    // Time goes on while a machine stands still, and counters and clocks with it; the guest is moved back by the time
    // in between.
    " tsc:",
    " clock:",
    // The guest has not heard of its new generation id yet: an event, and its interrupt on the way.
    " board:",
    " chips:",
    " lapic",
    // IA32_SYSENTER_ESP and IA32_SYSENTER_EIP: KVM keeps 32 bits of what a host writes there where the processor is
    // AMD's, which has no use for them in a 64-bit kernel.
    "index: 373,",
    "index: 374,",
    // A deadline that has passed, and whose interrupt is not to be seen in the APIC, is given again.
    "| tsc_deadline: 0, -> tsc_deadline: 1,",
    // The same on aarch64: the counter of each processor.
    "vcpu 0: VcpuState | }, | count:",
    "vcpu 1: VcpuState | }, | count:",
];

/// On aarch64, of the pending interrupts, which others may be among, that of the new generation id.
fn is_told(line: &str) -> bool {
    const GENERATION: u32 = 1 << 2;
    let values = line.split_once("Gic shared: Bank conditions | conditions: [ | ").and_then(|(_, rest)| {
        let (before, after) = rest.strip_suffix(',')?.split_once(", -> ")?;
        Some((before.parse::<u32>().ok()?, after.parse::<u32>().ok()?))
    });
    values.is_some_and(|(before, after)| before & GENERATION == 0 && after == before | GENERATION)
}

/// A name, what is in the state's file, how long the RAM's is, options, and a word of the refusal.
type Misuse<'a> = (&'a str, &'a [u8], u64, &'a [&'a str], &'a str);

fn misuse(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let initrd = initrd_with_part(ctx)?;
    let (first, directory) = saved(ctx, &initrd, 1)?;
    // Over one that is there, and while the guest runs.
    let over = first.try_ctl(["snapshot".as_ref(), directory.as_os_str()])?;
    ensure!(
        over.code() == Some(1) && over.err().contains("exists"),
        "a snapshot was written over: {}",
        over.err()
    );
    let mut driver = first.drive()?;
    let refused = driver.call(&serde_json::json!({"snapshot": {}}));
    ensure!(refused.is_err(), "a snapshot without files was granted: {refused:?}");
    ensure!(first.ctl(["state"])? == "running\n", "it does not go on after a snapshot that was refused");
    drop(first);
    let state = fs::read(directory.join("state"))?;
    let memory = directory.join("memory");
    let length = fs::metadata(&memory)?.len();
    let mut flipped = state.clone();
    flipped[state.len() / 2] ^= 4;
    let mut newer = state.clone();
    newer[8] = 77;
    let none: [&str; 0] = [];
    let cases: [Misuse<'_>; 8] = [
        ("cut", &state[..state.len() - 1], length, &none, "damaged"),
        ("flipped", &flipped, length, &none, "checksum"),
        ("newer", &newer, length, &none, "damaged"),
        ("empty", &[], length, &none, "no snapshot"),
        ("foreign", b"#!/bin/sh\nexec something else altogether\n", length, &none, "no snapshot"),
        ("short", &state, length - 4096, &none, "instead of"),
        ("more", &state, length, &["--share", "x=/tmp"], "leave it out"),
        ("option", &state, length, &["--cpus", "2"], "leave it out"),
    ];
    for (name, bytes, length, options, word) in cases {
        fs::write(directory.join("state"), bytes)?;
        fs::OpenOptions::new().write(true).open(&memory)?.set_len(length)?;
        let machine = boot(ctx, name).restore(&directory).options(options).start(&initrd)?;
        let done = machine.wait()?;
        let said = done.err();
        ensure!(matches!(done.code(), Some(1 | 2)), "{name}: it ended with {}: {said}", done.status);
        if said.trim_end().lines().count() != 1 || !said.contains(word) {
            bail!("{name}: the monitor said {said:?}, without {word:?} or in more than a line");
        }
    }
    Ok(Outcome::Passed)
}

//! A machine that is in the tool's way: no space, no loop devices, a host that never comes up.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, TOOL_FAILED};
use integration::{Ctx, Outcome, Rounds, Test};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::world::Outside;

pub fn tests() -> Vec<Test<Outside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(5),
        rounds: Rounds::once_or(3),
        tags: &["control"],
    };
    vec![
        test(
            "bed.boot-hangs",
            "a boot that hangs is killed at its deadline and shows its console's end",
            boot_hangs,
        ),
        test("bed.boot-panics", "a kernel that panics is reported with the console's end", boot_panics),
        test("bed.full-disk", "a full disk gives a clear message and no corrupt cache", full_disk),
        test("bed.no-loop-devices", "a machine without loop devices runs hosts as well", no_loop_devices),
    ]
}

/// What a host must not be able to find for its boot to fail.
const NO_INIT: &str = "rdinit=/nonexistent root=/dev/nonexistent";

/// A kernel that panics and stays so is what a hang looks like from outside.
fn boot_hangs(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let begun = Instant::now();
    let options =
        ["--cold", "--boot-timeout", "25", "--kernel-append", &format!("{NO_INIT} loglevel=7 panic=0")];
    let done = Outside::run(ctx, &options, ["true"])?.run()?.expect_code(TOOL_FAILED)?;
    let took = begun.elapsed();
    ensure!(took >= Duration::from_secs(25), "it gave up after {:.1} s already", took.as_secs_f64());
    ensure!(took < Duration::from_secs(90), "it gave up after {:.1} s only", took.as_secs_f64());
    shows_console(&done.err())?;
    ensure!(done.err().contains("25 s"), "the message does not name the deadline: {}", done.err());
    Ok(Outcome::Passed)
}

fn boot_panics(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    // With panic=-1 the machine resets at once, which ends QEMU.
    let options = ["--cold", "--kernel-append", &format!("{NO_INIT} loglevel=7 panic=-1")];
    let done = Outside::run(ctx, &options, ["true"])?.run()?.expect_code(TOOL_FAILED)?;
    shows_console(&done.err())?;
    Ok(Outcome::Passed)
}

/// The end of the console is in the message, as much as was promised of it and no more.
fn shows_console(message: &str) -> Result<()> {
    ensure!(message.contains("Kernel panic"), "the console's end is not in the message: {message}");
    let lines = message.lines().filter(|line| line.contains("] ")).count();
    ensure!(
        (10..=50).contains(&lines),
        "{lines} lines of the console are shown, 50 were promised: {message}"
    );
    Ok(())
}

/// Gives this process mounts of its own, which go away with it. `Some` says why that cannot be.
fn own_mounts() -> Option<String> {
    let none: Option<&str> = None;
    let made = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none));
    made.err().map(|error| format!("this process cannot have mounts of its own ({error}); run it as root"))
}

fn mount_tmpfs(place: &Path, options: &str) -> Result<()> {
    mount(Some("none"), place, Some("tmpfs"), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting a tmpfs at {}", place.display()))
}

fn bind(what: &Path, place: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(what), place, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("mounting {} at {}", what.display(), place.display()))
}

fn full_disk(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    if let Some(reason) = own_mounts() {
        return Ok(Outcome::Skipped(reason));
    }
    let users = ctx.world.bed()?;
    ctx.note("an empty cache, in which not even the image has room");
    no_space(ctx, &small_cache(ctx, &users, "empty")?)?;

    ctx.note("a cache with the image, but no room for what is made from it");
    // What it takes to make the image, if it is not there, is the time of this.
    Outside::run(ctx, &[], ["true"])?.ok()?;
    let bed = small_cache(ctx, &users, "image")?;
    for image in users.cached().iter().filter(|path| path.starts_with(users.cache.join("image"))) {
        let place = bed.cache.join("image").join(image.file_name().unwrap_or_default());
        fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
        bind(image, &place)?;
    }
    no_space(ctx, &bed)?;
    Ok(Outcome::Passed)
}

/// A bed whose cache is a new file system of a few MiB.
fn small_cache(ctx: &Ctx<'_, Outside>, users: &Bed, name: &str) -> Result<Bed> {
    let place = ctx.path(name);
    fs::create_dir(&place).with_context(|| format!("creating {}", place.display()))?;
    mount_tmpfs(&place, "size=40M")?;
    Ok(Bed { cache: place.join("supermachine/testbed"), ..users.clone() })
}

/// A run with the cache of `bed` says that there is no space, and adds nothing to the cache.
fn no_space(ctx: &Ctx<'_, Outside>, bed: &Bed) -> Result<()> {
    let before = bed.cached();
    let place = bed.cache.parent().and_then(Path::parent).context("a cache without parents")?;
    let command = bed.run(ctx.cmd(&bed.tool), NO_OPTIONS, ["true"]).env("XDG_CACHE_HOME", place);
    let done = command.run()?.expect_code(TOOL_FAILED)?;
    let said = done.err();
    ensure!(
        said.contains("space") && said.contains(&place.display().to_string()),
        "the message does not say that {} has no space: {said}",
        place.display()
    );
    // What is half made has the name of what it is to become with something added, and is not used.
    let added: Vec<_> = bed.cached().difference(&before).cloned().collect();
    ensure!(
        added.iter().all(|path| path.extension().is_some_and(|extension| extension == "new")),
        "without space for it, the cache got {added:?}"
    );
    ensure!(bed.run_directories().is_empty(), "left behind: {:?}", bed.run_directories());
    Ok(())
}

const NO_OPTIONS: [&str; 0] = [];

fn no_loop_devices(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    if let Some(reason) = own_mounts() {
        return Ok(Outcome::Skipped(reason));
    }
    let devices = fs::read_dir("/dev").context("reading /dev")?.flatten();
    for device in devices.filter(|entry| entry.file_name().to_string_lossy().starts_with("loop")) {
        // What cannot be opened as a loop device is as good as missing.
        if device.file_type().is_ok_and(|kind| !kind.is_dir()) {
            bind(Path::new("/dev/null"), &device.path())?;
        }
    }
    let done = Outside::run(ctx, &["--cold"], ["echo", "here"])?.ok()?;
    ensure!(done.out() == "here\n", "the host said {:?}", done.out());
    Ok(Outcome::Passed)
}

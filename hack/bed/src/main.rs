//! `testbed`: an emulated host that has virtualization, with containerd in it.
//!
//! `run` restores a saved host, runs a command in it and throws it away; `up` keeps one for many
//! `exec`s. Images and saved hosts are built when they are first needed and kept in the cache.

mod accel;
mod apt;
mod cache;
mod ending;
mod exec;
mod guest;
mod host;
mod image;
mod kernel;
mod newer_qemu;
mod oci;
mod payload;
mod progress;
mod qemu;
mod qmp;
mod saved;
mod spec;
mod tools;
mod usage;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::accel::Accel;
use crate::cache::{Cache, file_name};
use crate::ending::Ending;
use crate::host::{Host, Up, Workshop};
use crate::payload::Payload;
use crate::progress::say;
use crate::usage::{Call, Verb};

fn main() -> ExitCode {
    match tool() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn tool() -> Result<i32> {
    let ending = Ending::watch()?;
    let Some(call) = usage::parse(std::env::args_os())? else {
        print(usage::HELP);
        return Ok(0);
    };
    let cache = Cache::open(cache_dir()?)?;
    match &call.verb {
        Verb::Run(argv) => run(&cache, &call, argv, &ending),
        Verb::Up => up(&cache, &call, &ending),
        Verb::Exec(argv) => exec_in(&cache, &call, argv, false, &ending),
        Verb::Shell => exec_in(&cache, &call, &["bash".to_owned(), "-i".to_owned()], true, &ending),
        Verb::Down => {
            Up::find(&cache, &call.name())?.down(&cache)?;
            say(format_args!("{} is down", call.name()));
            Ok(0)
        }
        Verb::Status => status(&cache),
        Verb::Console => {
            let up = Up::find(&cache, &call.name())?;
            print(&String::from_utf8_lossy(&fs::read(up.dir.join("console"))?));
            Ok(0)
        }
        Verb::Build => {
            let workshop = Workshop::open(&cache, &call.start, &ending)?;
            saved::Saved::open(&workshop)?;
            Ok(0)
        }
        Verb::Clean => cache.clean().map(|()| 0),
        Verb::GuestFiles(dir) => {
            guest::write_installed(&cache, call.start.spec.arch, call.start.rebuild, dir).map(|()| 0)
        }
        Verb::BusyboxImage(busybox, tar) => oci::write_images(busybox, call.start.spec.arch, tar).map(|()| 0),
    }
}

/// For a reader that may have gone, as `head` does: that is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    if !base.is_absolute() {
        bail!("XDG_CACHE_HOME is {}: it must be an absolute path", base.display());
    }
    Ok(base.join("supermachine/testbed"))
}

fn run(cache: &Cache, call: &Call, argv: &[String], ending: &Ending) -> Result<i32> {
    let name = format!("run-{}", std::process::id());
    let mut host = start(cache, call, ending, &name, false)?;
    let code = exec::run(host.port(), argv, false, call.start.timeout, ending);
    let code = host.explain(code);
    host.end();
    code
}

/// A host that is fit for commands; by emulation, where this machine's KVM turns out not to run one.
fn start(cache: &Cache, call: &Call, ending: &Ending, name: &str, stay: bool) -> Result<Host> {
    let mut workshop = Workshop::open(cache, &call.start, ending)?;
    match Host::start(&workshop, &call.start, name, stay) {
        Err(error) if workshop.accel == Accel::Kvm => {
            say(format_args!(
                "the host does not run on this machine's KVM, emulation is used instead: {error:#}"
            ));
            Accel::give_up_kvm(cache)?;
            workshop.accel = Accel::Tcg;
            Host::start(&workshop, &call.start, name, stay)
        }
        started => started,
    }
}

fn up(cache: &Cache, call: &Call, ending: &Ending) -> Result<i32> {
    let name = call.name();
    let host = start(cache, call, ending, &name, true)?;
    fs::write(host.run_dir().join("spec"), call.start.spec.name())?;
    let share = call.start.share.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default();
    fs::write(host.run_dir().join("share"), share)?;
    fs::write(host.run_dir().join("prepared"), "")?;
    ending.leaves();
    host.leave();
    say(format_args!("{name} is up: hack/testbed exec -- CMD, shell, console, down"));
    Ok(0)
}

fn exec_in(cache: &Cache, call: &Call, argv: &[String], interactive: bool, ending: &Ending) -> Result<i32> {
    let up = Up::find(cache, &call.name())?;
    // What was built since the host was prepared is brought in first.
    let payload = Payload::build(call.start.spec.arch)?;
    let stamp = up.dir.join("prepared");
    if payload.newest()? > fs::metadata(&stamp)?.modified()? {
        host::prepare(up.port, false)?;
        fs::write(&stamp, "")?;
    }
    exec::run(up.port, argv, interactive, call.start.timeout, ending)
}

fn status(cache: &Cache) -> Result<i32> {
    cache.sweep()?;
    let runs = cache.runs()?;
    let mut lines = Vec::new();
    if runs.is_empty() {
        lines.push("no host is up".to_owned());
    }
    for dir in runs {
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let since = cache::age(&dir.join("pid")).unwrap_or_default().as_secs();
        let share = match read("share") {
            share if share.is_empty() => String::new(),
            share => format!(", shares {share}"),
        };
        lines.push(format!(
            "{}: {}, QEMU {}, for {} min{share}",
            file_name(&dir),
            match read("spec") {
                spec if spec.is_empty() => "one command".to_owned(),
                spec => spec,
            },
            read("pid"),
            since / 60
        ));
    }
    for kind in ["image", "saved"] {
        for dir in cache::children(&cache.path(kind))?.iter().filter(|path| path.is_dir()) {
            lines.push(format!("{kind} {}: {} MiB", file_name(dir), cache::disk_use(dir)? >> 20));
        }
    }
    print(&(lines.join("\n") + "\n"));
    Ok(0)
}

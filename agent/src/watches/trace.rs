//! When a process begins to watch something: the kernel writes a line into a trace that is only for that.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Where the kernel's traces are.
const TRACING: &str = "/sys/kernel/tracing";
/// Ours.
const OWN: &str = "instances/supermachine";
const EVENT: &str = "events/supermachine/watch/enable";
/// The call by which a process begins to watch.
#[cfg(target_arch = "x86_64")]
const CALL: &str = "__x64_sys_inotify_add_watch";
#[cfg(target_arch = "aarch64")]
const CALL: &str = "__arm64_sys_inotify_add_watch";
/// Lines are only counted on to be there, so a few are enough.
const BUFFER_KIB: &str = "4";

/// The trace. Whatever is in it, somebody has begun to watch.
pub struct Trace(OwnedFd);

impl Trace {
    /// Begins it. A kernel can have been built without.
    pub fn begin() -> Result<Self> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("tracefs"), TRACING, Some("tracefs"), flags, None::<&str>).context("mounting tracefs")?;
        let tracing = Path::new(TRACING);
        let set = |place: &str, text: &str| {
            let path = tracing.join(place);
            let opened = OpenOptions::new().append(true).open(&path);
            opened
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .with_context(|| format!("writing {text:?} to {}", path.display()))
        };
        set("kprobe_events", &format!("p:supermachine/watch {CALL}\n"))?;
        // Nobody reads who it was, and to know it the kernel would look at each change of processes. Traces have that from
        // the first one. It would work all the same.
        let _ = set("options/record-cmd", "0");
        let own = tracing.join(OWN);
        fs::create_dir(&own).with_context(|| format!("making {}", own.display()))?;
        set(&format!("{OWN}/buffer_size_kb"), BUFFER_KIB)?;
        // Whoever waits is woken by the first line.
        set(&format!("{OWN}/buffer_percent"), "0")?;
        let mut options = OpenOptions::new();
        let pipe = options.read(true).custom_flags(nix::libc::O_NONBLOCK).open(own.join("trace_pipe"));
        let pipe = pipe.context("opening the trace")?;
        set(&format!("{OWN}/{EVENT}"), "1")?;
        Ok(Self(pipe.into()))
    }
}

impl From<Trace> for OwnedFd {
    fn from(trace: Trace) -> Self {
        trace.0
    }
}

/// Takes out what is there. Whether nothing is left.
pub fn drain(pipe: &OwnedFd) -> bool {
    let Ok(mut file) = pipe.try_clone().map(File::from) else { return true };
    let mut buffer = [0; 4096];
    // The kernel fills a buffer so small in no time; who never stops calling is looked at once in a while.
    for _ in 0..64 {
        match file.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
    false
}

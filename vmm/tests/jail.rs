//! What a jailed monitor may still do, read back from /proc by whoever started it. Takes root and any KVM;
//! without them the test says so and passes.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // clippy takes only test functions, not their helpers, for tests

#[path = "machine/code.rs"]
mod code;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm::control::{Client, Request};

const SOON: Duration = Duration::from_secs(30);

/// The directories of one machine.
struct Bed(PathBuf);

impl Bed {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmm-jail-{}-{name}", std::process::id()));
        for part in ["root", "run", "share"] {
            fs::create_dir_all(path.join(part)).unwrap();
        }
        fs::write(path.join("kernel"), code::kernel(&[code::HI, code::DOTS].concat())).unwrap();
        Self(path)
    }

    fn path(&self, part: &str) -> PathBuf {
        self.0.join(part)
    }

    fn start(&self, more: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_supermachine-vmm"))
            .args(["run", "--console", "none", "--memory", "64M", "--kernel"])
            .arg(self.path("kernel"))
            .arg("--jail")
            .arg(self.path("root"))
            .arg("--control")
            .arg(self.path("run/control"))
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn client(bed: &Bed, child: &mut Child) -> Client {
    let deadline = Instant::now() + SOON;
    loop {
        if let Ok(client) = Client::connect(&bed.path("run/control"), SOON) {
            return client;
        }
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "it does not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The value of a line of `status`.
fn status(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn is_possible() -> bool {
    let namespaces = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
    let why = if !namespaces.is_ok_and(|status| status.success()) {
        "only root can build a jail"
    } else if File::open("/dev/kvm").is_err() {
        "there is no KVM"
    } else {
        return true;
    };
    eprintln!("not tested: {why}");
    false
}

#[test]
fn a_jailed_monitor_has_what_its_machine_needs_and_nothing_else() {
    if !is_possible() {
        return;
    }
    let bed = Bed::new("all");
    let share = format!("tag={}", bed.path("share").display());
    // Not closed on exec: the monitor inherits it.
    let inherited = nix::unistd::dup(File::open("/etc/passwd").unwrap()).unwrap();
    // What is asked for, the capabilities that stay, and what is in the root.
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&[], "0000000000000000", &["boot", "control", "dev", "proc"]),
        (&["--share", &share], "00000000880000db", &["boot", "control", "dev", "proc", "share"]),
    ];
    for (more, capabilities, root) in cases {
        let mut child = bed.start(more);
        let mut client = client(&bed, &mut child);
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        for task in fs::read_dir(proc.join("task")).unwrap() {
            // Threads that only built the machine may end meanwhile.
            let Ok(text) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
            for key in ["CapEff", "CapPrm", "CapBnd"] {
                assert_eq!(status(&text, key), *capabilities, "{key} of {}", status(&text, "Name"));
            }
            for key in ["CapInh", "CapAmb"] {
                assert_eq!(status(&text, key), "0000000000000000", "{key}");
            }
            assert_eq!(status(&text, "NoNewPrivs"), "1");
            assert_eq!(status(&text, "Seccomp"), "2");
            assert_eq!(status(&text, "Umask"), "0077");
        }
        assert_ne!(fs::read_link(proc.join("ns/mnt")).unwrap(), fs::read_link("/proc/self/ns/mnt").unwrap());
        let inside = proc.join("root");
        assert_eq!(names(&inside), set(root));
        assert_eq!(names(&inside.join("dev")), set(&["kvm"]));
        assert!(File::open(inside.join("etc/passwd")).is_err());
        assert!(File::create(inside.join("new")).is_err(), "its root cannot be written");
        let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
        assert!(mounts.lines().all(|line| line.contains("nosuid") && line.contains("noexec")), "{mounts}");
        let limits = fs::read_to_string(proc.join("limits")).unwrap();
        for (name, value) in [("Max core file size", "0"), ("Max locked memory", "0")] {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            assert!(line.split_whitespace().take(2).all(|word| word == value), "{name}{line}");
        }
        for fd in fs::read_dir(proc.join("fd")).unwrap() {
            let target = fs::read_link(fd.unwrap().path()).unwrap();
            assert!(!target.starts_with("/etc"), "{}", target.display());
        }
        client.call(Request::Pause { within_ms: 10_000 }, &[], SOON).unwrap();
        client.call(Request::Stop, &[], SOON).unwrap();
        drop(client);
        assert_eq!(child.wait().unwrap().code(), Some(6));
        for part in ["root", "run"] {
            assert_eq!(names(&bed.path(part)), set(&[]), "{part} is as it was");
        }
    }
    drop(inherited);
}

#[test]
fn a_jail_that_cannot_be_is_refused_and_leaves_nothing() {
    if !is_possible() {
        return;
    }
    let bed = Bed::new("refused");
    let missing = bed.path("missing").display().to_string();
    for more in [["--cgroup", &missing], ["--netns", &missing], ["--jail", &missing], ["--vsock", &missing]] {
        let child = bed.start(&more).wait_with_output().unwrap();
        assert_eq!(child.status.code(), Some(1), "{more:?}");
        assert_eq!(names(&bed.path("run")), set(&[]), "{more:?}");
    }
}

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

struct Bed(PathBuf);

impl Bed {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("checkpoint-{}-{number}", std::process::id()));
        Self(directory)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn about() -> About {
    let streams = StreamSet { terminal: false, stdin: true, stdout: true, stderr: true };
    let mount = Mount { destination: "/data".into(), source: "/run/supermachine/binds/c/binds/0".into() };
    let mut about = About::new("c", 3, streams, vec![mount]);
    about.execs.push(Exec { id: "e".into(), streams });
    about.last_event = 7;
    about
}

fn written(bed: &Bed) {
    let writing = Writing::begin(&bed.0).unwrap();
    (&writing.state).write_all(b"state").unwrap();
    (&writing.memory).write_all(b"memory").unwrap();
    writing.finish(&about()).unwrap();
}

#[test]
fn what_is_written_is_read() {
    let bed = Bed::new();
    written(&bed);
    let checkpoint = Checkpoint::open(&bed.0).unwrap();
    assert_eq!(checkpoint.about, about());
    // Nothing of another is overwritten.
    let error = Writing::begin(&bed.0).unwrap_err();
    assert!(error.text.contains("exists"), "{error}");
    let digest = checkpoint.digest().unwrap();
    assert_eq!(digest, checkpoint.digest().unwrap());
    // What goes from one file to the other is another checkpoint.
    fs::write(bed.0.join(STATE_FILE), b"statem").unwrap();
    fs::write(bed.0.join(MEMORY_FILE), b"emory").unwrap();
    assert_ne!(digest, checkpoint.digest().unwrap());
    checkpoint.dispose();
    assert!(bed.0.exists(), "a directory that somebody else has named");
}

#[test]
fn one_that_is_not_finished_leaves_nothing() {
    let bed = Bed::new();
    drop(Writing::begin(&bed.0).unwrap());
    assert_eq!(fs::read_dir(&bed.0).unwrap().count(), 0);
    // Of its second file there is one already, which is somebody else's.
    fs::write(bed.0.join(MEMORY_FILE), b"theirs").unwrap();
    Writing::begin(&bed.0).unwrap_err();
    let left: Vec<_> = fs::read_dir(&bed.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [MEMORY_FILE]);
}

#[test]
fn what_is_none_of_ours_is_refused() {
    let bed = Bed::new();
    let refusal = |text: Option<&str>| {
        let _ = fs::remove_dir_all(&bed.0);
        written(&bed);
        match text {
            Some(text) => fs::write(bed.0.join(ABOUT_FILE), text).unwrap(),
            None => fs::remove_file(bed.0.join(ABOUT_FILE)).unwrap(),
        }
        Checkpoint::open(&bed.0).unwrap_err().text
    };
    let good = serde_json::to_string(&about()).unwrap();
    for (text, word) in [
        (None, "none of this runtime's"),
        (Some(""), "EOF"),
        (Some("{\"version\":2}"), "version 2"),
        (Some("{\"version\":1}"), "missing field"),
        (Some(&good.replace("\"c\"", "\"../c\"")), "not an id"),
        (Some(&good.replace("\"e\"", "\"/\"")), "not an id"),
        (Some(&good.replace("\"ordinal\"", "\"more\":1,\"ordinal\"")), "unknown field"),
        (Some(&good.replace("\"ordinal\":3", "\"ordinal\":-3")), "invalid value"),
    ] {
        let error = refusal(text);
        assert!(error.contains(word) && error.contains(bed.0.to_str().unwrap()), "{text:?}: {error}");
    }
    // Longer than any of ours: it is not read whole.
    let error = refusal(Some(&" ".repeat(LARGEST as usize + 1)));
    assert!(error.contains("EOF"), "{error}");
}

#[test]
fn directories_that_containerd_forgets_are_removed() {
    let bed = Bed::new();
    let inner = Bed(bed.0.join("ctrd-checkpoint123"));
    written(&inner);
    Checkpoint::open(&inner.0).unwrap().dispose();
    assert!(!inner.0.exists() && bed.0.exists());
}

#[test]
fn which_streams_there_are() {
    let stdio = Stdio { terminal: true, stdin: true, stdout: true, stderr: true, ..Stdio::default() };
    let streams = StreamSet::from(&stdio);
    assert!(streams.terminal && streams.has(Stream::Stdin) && streams.has(Stream::Stdout));
    assert!(!streams.has(Stream::Stderr), "a terminal has no stream of errors");
}

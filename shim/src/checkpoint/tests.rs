use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

struct Bed(PathBuf);

impl Bed {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("checkpoint-{}-{number}", std::process::id()));
        fs::create_dir(&directory).unwrap();
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
    let spec = serde_json::json!({ "ociVersion": "1.1.0", "mounts": [
        { "destination": "/data", "type": "bind", "source": "/run/supermachine/binds/c/binds/0" },
        { "destination": "/proc", "type": "proc", "source": "proc" },
    ] });
    let mut about = About::new("c", &serde_json::from_value(spec).unwrap(), streams, 7);
    about.execs.push(Exec { id: "e".into(), streams, exited: false });
    about
}

fn written(bed: &Bed) {
    let writing = Writing::begin(&bed.0).unwrap();
    (&writing.state).write_all(b"state").unwrap();
    (&writing.memory).write_all(b"memory").unwrap();
    writing.describe(&about()).unwrap();
    writing.keep();
}

#[test]
fn what_is_written_is_read() {
    let bed = Bed::new();
    written(&bed);
    let checkpoint = Checkpoint::open(&bed.0).unwrap();
    assert_eq!(checkpoint.about, about());
    // What is the machine's own is no matter of the host's.
    let source = "/run/supermachine/binds/c/binds/0".into();
    assert_eq!(checkpoint.about.mounts, [Mount { destination: "/data".into(), source }]);
    // Nothing of another is overwritten.
    let error = Writing::begin(&bed.0).unwrap_err();
    assert!(error.text.contains("exists"), "{error}");
    let digest = checkpoint.digest().unwrap();
    assert_eq!(digest, checkpoint.digest().unwrap());
    // What goes from one file to the other is another checkpoint.
    fs::write(bed.0.join(STATE_FILE), b"statem").unwrap();
    fs::write(bed.0.join(MEMORY_FILE), b"emory").unwrap();
    assert_ne!(digest, checkpoint.digest().unwrap());
}

#[test]
fn one_that_is_not_finished_leaves_nothing() {
    let bed = Bed::new();
    let writing = Writing::begin(&bed.0).unwrap();
    writing.describe(&about()).unwrap();
    drop(writing);
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
        fs::remove_dir_all(&bed.0).unwrap();
        fs::create_dir(&bed.0).unwrap();
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
        (Some(&good.replace("\"last_event\"", "\"more\":1,\"last_event\"")), "unknown field"),
        (Some(&good.replace("\"last_event\":7", "\"last_event\":-7")), "invalid value"),
    ] {
        let error = refusal(text);
        assert!(error.contains(word) && error.contains(bed.0.to_str().unwrap()), "{text:?}: {error}");
    }
    // Longer than any of ours: it is not read whole.
    let error = refusal(Some(&" ".repeat(LARGEST as usize + 1)));
    assert!(error.contains("EOF"), "{error}");
}

#[test]
fn directories_that_containerd_forgets_are_removed_and_no_others() {
    for (path, expected) in [
        ("/tmp/ctrd-checkpoint1234567", true),
        ("/tmp/ctrd-checkpoint", false),
        ("/tmp/ctrd-checkpoint12a", false),
        ("/tmp/mine", false),
        ("/tmp/a/ctrd-checkpoint12", false),
        ("/backup/ctrd-checkpoint12", false),
        ("/tmp/ctrd-checkpoint12/..", false),
    ] {
        assert_eq!(is_containerds(Path::new(path)), expected, "{path}");
    }
    let directory = PathBuf::from(format!("/tmp/ctrd-checkpoint{}", std::process::id()));
    let bed = Bed(directory.clone());
    fs::create_dir_all(&bed.0).unwrap();
    written(&bed);
    dispose(&directory);
    assert!(!directory.exists());
    let other = Bed::new();
    dispose(&other.0);
    assert!(other.0.exists());
}

#[test]
fn a_disk_is_known_by_its_beginning() {
    let bed = Bed::new();
    let path = bed.0.join("image");
    let block = Block {
        serial: "c0b0".into(),
        source: runtime_spec::plan::BlockSource::Path(path.clone()),
        readonly: true,
    };
    let known = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        disks(std::slice::from_ref(&block)).unwrap()
    };
    let first = known(&[1; 4096]);
    assert_eq!((first.len(), first[0].serial.as_str()), (1, "c0b0"));
    assert_eq!(first, known(&[1; 4096]));
    assert_ne!(first, known(&[2; 4096]));
    assert_ne!(first, known(&[1; 4608]));
    // No more of a large one is read.
    let mut large = vec![1; HEAD as usize + 512];
    let before = known(&large);
    large[HEAD as usize] = 2;
    assert_eq!(before, known(&large));
    fs::remove_file(&path).unwrap();
    assert!(disks(&[block]).unwrap_err().text.contains("image"));
}

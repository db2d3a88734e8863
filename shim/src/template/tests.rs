//! Templates whose snapshots are a few bytes, in stores of their own.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Instant, SystemTime};

use runtime_spec::config::{self, Bytes};

use super::key::tests::parts;
use super::*;

const NOW: Duration = Duration::ZERO;
const SOON: Duration = Duration::from_secs(20);

struct Bed {
    store: Store,
    directory: PathBuf,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn of(online: u32) -> (Of, Key) {
    let parts = Parts { online, ..parts() };
    let key = parts.key().unwrap();
    (Of::Template(parts), key)
}

impl Bed {
    fn new(name: &str) -> Self {
        Self::within(name, 1 << 30)
    }

    fn within(name: &str, max_bytes: u64) -> Self {
        let directory = std::env::temp_dir().join(format!("template-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let config = config::Template { directory: directory.clone(), max_bytes: Bytes(max_bytes) };
        let store = Store::new(&config);
        store.prepare().unwrap();
        Self { store, directory }
    }

    async fn obtain(
        &self,
        online: u32,
        outcome: std::result::Result<(), Unmade>,
    ) -> (Result<(Template, Way)>, bool) {
        let made = AtomicU32::new(0);
        let make = async |making: &Making| {
            made.fetch_add(1, Ordering::Relaxed);
            fill(making);
            outcome
        };
        let obtained = obtain(&self.store, of(online).0, NOW, make).await;
        (obtained, made.load(Ordering::Relaxed) > 0)
    }

    /// Whether it is found, or made, or neither.
    async fn way(&self, online: u32) -> Option<Way> {
        self.obtain(online, Ok(())).await.0.ok().map(|(_, way)| way)
    }

    fn there(&self, key: &Key, end: &str) -> PathBuf {
        self.directory.join(format!("{key}{end}"))
    }
}

fn fill(making: &Making) {
    (&making.state).write_all(b"state").unwrap();
    (&making.memory).write_all(&vec![7; 100_000]).unwrap();
}

fn age(path: &Path, seconds: u64) {
    let then = SystemTime::now() - Duration::from_secs(seconds);
    File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
}

#[tokio::test]
async fn the_first_makes_it_and_others_find_it() {
    let bed = Bed::new("first");
    let (first, made) = bed.obtain(1, Ok(())).await;
    let (template, way) = first.unwrap();
    assert!(made && way == Way::Made && !template.proven);
    assert_eq!(fs::read(template.directory.join("state")).unwrap(), b"state");
    template.worked();
    let (second, made) = bed.obtain(1, Ok(())).await;
    let (second, way) = second.unwrap();
    assert!(!made && way == Way::Found && second.proven);
    assert_eq!(bed.way(2).await, Some(Way::Made), "another shape has another one");
    assert_eq!(bed.store.list().unwrap().len(), 2);
}

#[tokio::test]
async fn many_at_once_have_it_made_once() {
    let bed = Bed::new("many");
    let made = AtomicU32::new(0);
    let one = || async {
        let make = async |making: &Making| {
            made.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
            fill(making);
            Ok(())
        };
        obtain(&bed.store, of(1).0, SOON, make).await.unwrap().1
    };
    let (a, b, c) = tokio::join!(one(), one(), one());
    assert_eq!(made.load(Ordering::Relaxed), 1);
    assert_eq!([a, b, c].iter().filter(|way| **way == Way::Made).count(), 1);
    // Whoever makes it for too long is not waited for.
    let (_, key) = of(2);
    let held = bed.store.lock(&key, NOW).unwrap().unwrap();
    let begun = Instant::now();
    let (late, tried) = bed.obtain(2, Ok(())).await;
    assert!(!tried && begun.elapsed() < SOON);
    assert!(late.unwrap_err().text.contains("somebody makes it"));
    drop(held);
    assert_eq!(bed.way(2).await, Some(Way::Made));
}

#[tokio::test]
async fn what_cannot_be_made_leaves_nothing_and_is_not_tried_again_at_once() {
    let bed = Bed::new("failed");
    let (_, key) = of(1);
    let (failed, tried) = bed.obtain(1, Err(Unmade::Anywhere(Error::unknown("no space")))).await;
    assert!(tried && failed.unwrap_err().text == "no space");
    assert!(!bed.there(&key, ".new").exists() && !bed.there(&key, "").exists());
    let (again, tried) = bed.obtain(1, Ok(())).await;
    assert!(!tried && again.unwrap_err().text.contains("no space"));
    assert!(bed.obtain(2, Err(Unmade::Here(Error::unknown("killed")))).await.0.is_err());
    assert_eq!(bed.way(2).await, Some(Way::Made), "another one may");
    age(&bed.there(&key, ".failed"), 3600);
    assert_eq!(bed.way(1).await, Some(Way::Made));
    assert!(!bed.there(&key, ".failed").exists());
}

/// What a maker leaves that is killed, in the order of its steps, and what becomes of it.
#[tokio::test]
async fn a_maker_that_dies_leaves_nothing_that_is_taken_for_a_template() {
    type Step = fn(&Bed, &Key);
    let steps: [(&str, Step, Way); 8] = [
        ("nothing but the lock", |bed, key| drop(bed.store.lock(key, NOW).unwrap()), Way::Made),
        ("an empty directory", |bed, key| fs::create_dir(bed.there(key, ".new")).unwrap(), Way::Made),
        (
            "half a snapshot",
            |bed, key| {
                let lock = bed.store.lock(key, NOW).unwrap().unwrap();
                fill(&bed.store.begin(key, &lock).unwrap());
            },
            Way::Made,
        ),
        (
            "all but its name",
            |bed, key| fs::rename(bed.there(key, ""), bed.there(key, ".new")).unwrap(),
            Way::Made,
        ),
        (
            "an older one half removed",
            |bed, key| fs::rename(bed.there(key, ""), bed.there(key, ".old")).unwrap(),
            Way::Made,
        ),
        (
            "an older one half removed, under its name",
            |bed, key| fs::remove_file(bed.there(key, "").join("used")).unwrap(),
            Way::Made,
        ),
        ("another one half made", |bed, key| fs::create_dir(bed.there(key, ".new")).unwrap(), Way::Found),
        ("a note half written", |bed, key| fs::write(bed.there(key, ".failed"), "").unwrap(), Way::Found),
    ];
    for (number, (name, step, way)) in steps.iter().enumerate() {
        let bed = Bed::new(&format!("dies-{number}"));
        if number > 2 {
            assert_eq!(bed.way(1).await, Some(Way::Made));
        }
        let (_, key) = of(1);
        step(&bed, &key);
        assert_eq!(bed.way(1).await, Some(*way), "{name}");
        bed.store.prune(None).unwrap();
        for end in [".new", ".old"] {
            assert!(!bed.there(&key, end).exists(), "{name} leaves {end}");
        }
        assert_eq!(bed.store.list().unwrap().len(), 1, "{name}");
    }
}

#[tokio::test]
async fn a_journal_undoes_a_making_that_nobody_goes_on_with() {
    let bed = Bed::new("journal");
    let (_, key) = of(1);
    let lock = bed.store.lock(&key, NOW).unwrap().unwrap();
    fill(&bed.store.begin(&key, &lock).unwrap());
    let path = bed.store.making(&key);
    store::abandoned(&path).unwrap();
    assert!(path.exists(), "somebody makes it");
    drop(lock);
    store::abandoned(&path).unwrap();
    assert!(!path.exists());
    store::abandoned(&path).unwrap();
}

#[tokio::test]
async fn one_that_is_not_what_it_was_is_made_again() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 6] = [
        ("its memory is cut", |path| {
            File::options().write(true).open(path.join("memory")).unwrap().set_len(5).unwrap();
        }),
        ("its memory is gone", |path| fs::remove_file(path.join("memory")).unwrap()),
        ("its state is longer", |path| fs::write(path.join("state"), "state and more").unwrap()),
        ("its description is cut", |path| fs::write(path.join("about.json"), "{\"of\":").unwrap()),
        ("its description is gone", |path| fs::remove_file(path.join("about.json")).unwrap()),
        ("it is another's", |path| {
            let text = fs::read_to_string(path.join("about.json")).unwrap();
            fs::write(path.join("about.json"), text.replace("\"aa\"", "\"ab\"")).unwrap();
        }),
    ];
    for (number, (name, harm)) in harms.iter().enumerate() {
        let bed = Bed::new(&format!("harm-{number}"));
        assert_eq!(bed.way(1).await, Some(Way::Made));
        let (_, key) = of(1);
        harm(&bed.there(&key, ""));
        assert!(matches!(bed.store.open(&key).unwrap(), Found::Spoilt(_)), "{name}");
        assert_eq!(bed.way(1).await, Some(Way::Made), "{name}");
        assert_eq!(bed.way(1).await, Some(Way::Found), "{name}");
    }
}

#[tokio::test]
async fn one_that_no_machine_can_be_restored_from_goes() {
    let bed = Bed::new("discard");
    let (template, _) = bed.obtain(1, Ok(())).await.0.unwrap();
    discard(&bed.store, template, "refused").await;
    let (_, key) = of(1);
    assert!(!bed.there(&key, "").exists());
    let (again, tried) = bed.obtain(1, Ok(())).await;
    assert!(!tried && again.unwrap_err().text.contains("refused"), "it never worked");
    bed.store.forget_failure(&key);
    let (template, _) = bed.obtain(1, Ok(())).await.0.unwrap();
    template.worked();
    drop(template);
    let (template, way) = bed.obtain(1, Ok(())).await.0.unwrap();
    assert_eq!(way, Way::Found);
    discard(&bed.store, template, "refused").await;
    assert_eq!(bed.way(1).await, Some(Way::Made), "it had worked before");
}

#[tokio::test]
async fn the_one_used_longest_ago_goes_first_and_one_in_use_stays() {
    let bed = Bed::within("prune", 250_000);
    let mut keys = Vec::new();
    for online in [1, 2] {
        let (template, _) = bed.obtain(online, Ok(())).await.0.unwrap();
        template.worked();
        keys.push(template.key.clone());
        drop(template);
        age(&bed.there(&keys[keys.len() - 1], "").join("used"), 100 - u64::from(online));
    }
    let (held, _) = bed.obtain(1, Ok(())).await.0.unwrap();
    assert!(bed.store.list().unwrap().iter().any(|one| one.key == keys[0] && one.in_use));
    // The first is the oldest, but in use.
    assert_eq!(bed.way(3).await, Some(Way::Made));
    let left: Vec<_> = bed.store.list().unwrap().into_iter().map(|one| one.key).collect();
    assert!(left.contains(&keys[0]) && !left.contains(&keys[1]) && left.contains(&of(3).1), "{left:?}");
    assert!(!bed.there(&keys[1], ".lock").exists());
    assert!(!bed.store.remove(&keys[0], false).unwrap(), "it is in use");
    drop(held);
    assert_eq!(bed.way(4).await, Some(Way::Made));
    assert!(!bed.there(&keys[0], "").exists());
    // One that is larger than all may be stays, as long as it is the one that is wanted.
    let small = Bed::within("small", 1);
    assert_eq!(small.way(1).await, Some(Way::Made));
    assert_eq!(small.way(1).await, Some(Way::Found));
    assert_eq!(small.store.prune(None).unwrap(), [of(1).1]);
    assert_eq!(small.store.list().unwrap().len(), 0);
}

#[tokio::test]
async fn what_several_lie_over_counts_once() {
    let bed = Bed::new("base");
    for online in [1, 2, 3] {
        assert_eq!(bed.way(online).await, Some(Way::Made));
    }
    let on_disk = || -> Vec<u64> {
        let mut listed = bed.store.list().unwrap();
        listed.sort_by(|one, other| one.key.cmp(&other.key));
        listed.into_iter().map(|one| one.on_disk).collect()
    };
    let before = on_disk();
    let (lowest, others) = (of(1).1, [of(2).1, of(3).1]);
    let memory = bed.there(&lowest, "").join("memory");
    for key in &others {
        fs::hard_link(&memory, bed.there(key, "").join("base")).unwrap();
    }
    assert_eq!(on_disk(), before, "it is the first one's");
    let base = std::os::unix::fs::MetadataExt::blocks(&memory.metadata().unwrap()) * 512;
    bed.store.remove(&lowest, false).unwrap();
    assert_eq!(bed.store.list().unwrap().len(), 2);
    assert!(base > 0);
    let mut rest = bed.store.list().unwrap();
    rest.sort_by_key(|one| one.on_disk);
    assert_eq!(rest[1].on_disk - rest[0].on_disk, base, "one of the two that are left has it");
}

#[test]
fn a_store_that_others_can_write_to_is_none() {
    use std::os::unix::fs::PermissionsExt;
    let bed = Bed::new("others");
    fs::set_permissions(&bed.directory, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(bed.store.prepare().unwrap_err().text.contains("chmod 700"));
}

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use runtime_spec::config::{self, Config};
use runtime_spec::host::Host;
use runtime_spec::{Request, RootfsMount};

use super::*;
use crate::host::HostFiles;
use crate::template::lock::Lock;

const STREAMS: StreamSet = StreamSet { terminal: false, stdin: true, stdout: true, stderr: true };

/// Each machine has a tree of its own.
static PLANNED: AtomicU32 = AtomicU32::new(0);

struct Bed(PathBuf);

impl Bed {
    fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("warm-{}-{number}", std::process::id()));
        for name in ["lower", "upper", "work", "secret", "store"] {
            fs::create_dir_all(directory.join(name)).unwrap();
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn store(&self) -> Store {
        Store::new(&config::Template { directory: self.path("store"), ..config::Template::default() })
    }

    fn spec(&self) -> Value {
        json!({
            "ociVersion": "1.1.0", "hostname": "one", "root": { "path": "rootfs" },
            "annotations": { "dev.supermachine.warm": "log:ready$", "who": "one" },
            "process": {
                "args": ["serve", "all"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
                "env": ["A=1", "HOSTNAME=one"],
                "capabilities": { "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_FOWNER"] },
            },
            "mounts": [
                { "destination": "/secret", "type": "bind", "source": self.path("secret"), "options": ["rbind", "ro"] },
            ],
            "linux": { "namespaces": [
                { "type": "uts" }, { "type": "mount" }, { "type": "network" }, { "type": "pid" }, { "type": "ipc" },
            ] },
        })
    }

    fn plan(&self, spec: &Value, rootfs: &[&str]) -> Plan {
        let (spec, _) = runtime_spec::read::spec(spec.to_string().as_bytes()).unwrap();
        let rootfs = [RootfsMount {
            typ: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: rootfs.iter().map(|option| option.replace('@', self.0.to_str().unwrap())).collect(),
        }];
        let config = Config::default();
        let request = Request {
            id: "c",
            guest_id: runtime_spec::layout::WARM,
            namespace: "ns",
            bundle: &self.path("bundle"),
            share: &self.path(&format!("tree-{}", PLANNED.fetch_add(1, Ordering::Relaxed))),
            spec: &spec,
            rootfs: &rootfs,
            terminal: false,
            ordinal: 0,
            config: &config,
            host: Host { cpus: 4, memory: 8 << 30, hostname: "host", files: &HostFiles },
            pod: None,
        };
        runtime_spec::plan(&request).unwrap()
    }

    fn usual(&self, edit: impl FnOnce(&mut Value)) -> Wanted {
        let mut spec = self.spec();
        edit(&mut spec);
        of(&self.plan(&spec, &ROOTFS), STREAMS, &template())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const ROOTFS: [&str; 4] = ["index=off", "lowerdir=@/lower", "upperdir=@/upper", "workdir=@/work"];

fn of(plan: &Plan, streams: StreamSet, template: &Key) -> Wanted {
    let warm = plan.machine.as_ref().and_then(|machine| machine.warm.as_ref()).unwrap();
    wanted(plan, "ns", Condition::of(warm).unwrap(), streams, template).unwrap()
}

fn template() -> Key {
    Key::parse(&"0123456789abcdef".repeat(2)).unwrap()
}

#[test]
fn who_may_start_from_whom() {
    let bed = Bed::new();
    let key = |edit: &dyn Fn(&mut Value)| bed.usual(edit).sort.key().unwrap();
    let same = key(&|_| {});
    let names = |spec: &mut Value| {
        spec["hostname"] = "two".into();
        spec["annotations"]["who"] = "two".into();
        spec["process"]["env"][1] = "HOSTNAME=two".into();
        spec["mounts"][0]["source"] = bed.path("upper").to_str().unwrap().into();
    };
    assert_eq!(key(&names), same, "names, and what is bound, are each container's own");
    let edits: [&dyn Fn(&mut Value); 7] = [
        &|spec| spec["process"]["env"][0] = "A=2".into(),
        &|spec| spec["process"]["env"][1] = "HOSTNAME=two".into(),
        &|spec| spec["process"]["args"][1] = "some".into(),
        &|spec| spec["process"]["user"]["uid"] = 1.into(),
        &|spec| spec["mounts"][0]["destination"] = "/other".into(),
        &|spec| spec["mounts"][0]["options"] = json!(["rbind", "rro"]),
        &|spec| spec["annotations"]["dev.supermachine.warm"] = "log:ready".into(),
    ];
    let mut keys: Vec<_> = edits.iter().map(|edit| key(edit)).collect();
    let plan = bed.plan(&bed.spec(), &ROOTFS);
    let other = |plan: &Plan, streams, template: &Key| of(plan, streams, template).sort.key().unwrap();
    keys.push(other(&plan, StreamSet { stderr: false, ..STREAMS }, &template()));
    keys.push(other(&plan, STREAMS, &Key::parse(&"f".repeat(32)).unwrap()));
    keys.push(other(
        &bed.plan(&bed.spec(), &["lowerdir=@/work:@/lower", "upperdir=@/upper"]),
        STREAMS,
        &template(),
    ));
    let others = wanted(&plan, "other", Condition::Created, STREAMS, &template()).unwrap();
    keys.push(others.sort.key().unwrap());
    let mut larger = plan;
    larger.machine.as_mut().unwrap().size.memory += 1;
    keys.push(other(&larger, STREAMS, &template()));
    // containerd was set up anew, and has other files under the same name.
    fs::remove_dir(bed.path("lower")).unwrap();
    fs::create_dir(bed.path("other")).unwrap();
    fs::create_dir(bed.path("lower")).unwrap();
    keys.push(key(&|_| {}));
    keys.push(same);
    let count = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), count);
}

#[test]
fn what_is_in_the_way() {
    let bed = Bed::new();
    let why = |rootfs: &[&str], boot: &str| {
        let mut spec = bed.spec();
        spec["annotations"]["dev.supermachine.boot"] = boot.into();
        obstacle(&bed.plan(&spec, rootfs)).unwrap_or("nothing")
    };
    assert_eq!(why(&ROOTFS, "restore"), "nothing");
    assert!(why(&ROOTFS, "cold").contains("boot"));
    assert!(why(&["lowerdir=@/lower:@/work"], "restore").contains("written"));
    let mut volume = bed.spec();
    volume["mounts"][0]["options"] = json!(["rbind", "rw"]);
    assert!(obstacle(&bed.plan(&volume, &ROOTFS)).unwrap().contains("read-only"));
    let mut plan = bed.plan(&bed.spec(), &ROOTFS);
    plan.kind = runtime_spec::Kind::Sandbox;
    assert!(obstacle(&plan).unwrap().contains("pod"));
}

#[test]
fn conditions() {
    let of = |text: &str| Condition::of(&text.parse().unwrap());
    assert!(matches!(of("created").unwrap(), Condition::Created));
    assert!(matches!(of("listen").unwrap(), Condition::Listen(None)));
    assert!(matches!(of("listen:80").unwrap(), Condition::Listen(Some(80))));
    assert!(matches!(of("after:5").unwrap(), Condition::After(time) if time == Duration::from_millis(5)));
    assert!(
        matches!(of("log:^up (in )?[0-9]+s").unwrap(), Condition::Log(line) if line.is_match(b"up in 20s"))
    );
    for wrong in ["log:(", "log:((a{1000}){1000}){1000}"] {
        let error = of(wrong).unwrap_err();
        assert!(error.code == ttrpc::Code::INVALID_ARGUMENT && error.text.contains("warm"), "{error}");
    }
}

fn kept(bed: &Bed, wanted: &Wanted) -> Lock {
    let (store, key) = (bed.store(), wanted.sort.key().unwrap());
    let lock = store.lock(&key, Duration::ZERO).unwrap().unwrap();
    let making = store.begin(&key, &lock).unwrap();
    let about = About::new("warm", &oci_spec::runtime::Spec::default(), STREAMS, 7);
    describe(&making, about, true, &[b"ready\n".to_vec(), Vec::new()]).unwrap();
    keep_files(&making, &wanted.upper).unwrap();
    store.finish(&key, &lock, &making, template::Of::Warm(wanted.sort.clone())).unwrap();
    lock
}

#[test]
fn what_is_kept_is_found_and_gives_its_files() {
    let bed = Bed::new();
    let wanted = bed.usual(|_| {});
    assert_eq!(wanted.sort.command, "serve all");
    assert!(find(&bed.store(), &wanted).unwrap().is_none());
    fs::write(bed.path("upper/pid"), "1").unwrap();
    drop(kept(&bed, &wanted));
    let start = find(&bed.store(), &wanted).unwrap().unwrap();
    assert!(start.started && start.about.container == "warm");
    assert_eq!(start.said, [b"ready\n".to_vec(), Vec::new()]);
    fs::write(bed.path("upper/pid"), "2").unwrap();
    fs::create_dir(bed.path("fresh")).unwrap();
    fill(&start.template.directory, &bed.path("fresh")).unwrap();
    assert_eq!(fs::read_to_string(bed.path("fresh/pid")).unwrap(), "1");
    // Its files count for what the store may have.
    fs::write(start.template.directory.join("upper/large"), vec![1; 1 << 20]).unwrap();
    let listed = bed.store().list().unwrap();
    assert!(listed[0].bytes > 1 << 20 && listed[0].on_disk >= 1 << 20, "{listed:?}");
}

#[test]
fn one_that_cannot_be_read_goes() {
    let bed = Bed::new();
    let wanted = bed.usual(|_| {});
    let file = |name: &str| bed.path("store").join(wanted.sort.key().unwrap().as_str()).join(name);
    for spoil in [
        &(|| fs::write(file("container.json"), "{}").unwrap()) as &dyn Fn(),
        &|| fs::remove_file(file("stdout")).unwrap(),
        &|| fs::write(file("memory"), "more").unwrap(),
    ] {
        drop(kept(&bed, &wanted));
        spoil();
        assert!(find(&bed.store(), &wanted).unwrap().is_none());
        assert!(bed.store().list().unwrap().is_empty(), "it is still there");
    }
}

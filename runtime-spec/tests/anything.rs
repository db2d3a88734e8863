//! Whatever is asked for, there is a plan or an error that says where: never a panic.

use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use runtime_spec::config::{self, Config, Layer, Reach};
use runtime_spec::host::{Files, Found, Host, Owner, Pod, Task};
use runtime_spec::{Request, RootfsMount, exec, plan, read, update};
use serde_json::{Map, Value, json};

/// A host on which anything may be anywhere, but always the same. Mostly it is what a container needs.
struct Any(u64);

impl Files for Any {
    fn look(&self, path: &Path) -> Found {
        let text = path.as_os_str().as_encoded_bytes();
        let step = |sum: u64, byte: &u8| sum.wrapping_mul(0x0100_0000_01b3) ^ u64::from(*byte);
        match text.iter().fold(self.0, step) >> 7 & 255 {
            0 => Found::Missing,
            1 => Found::Fifo,
            2 => Found::Character { major: 1, minor: 3 },
            3 => Found::Character { major: 9, minor: 9 },
            4 => Found::Block { major: 8, minor: 0 },
            5 => Found::Namespace { initial: true, id: 1 },
            6 => Found::Directory,
            7..=12 => Found::Socket(Owner { uid: 0, gid: 0, mode: 0o777 }),
            13..=24 => Found::File,
            _ if path.to_string_lossy().starts_with("/image") => Found::File,
            _ if path.to_string_lossy().contains("netns") => Found::Namespace { initial: false, id: 7 },
            _ => Found::Directory,
        }
    }

    fn tmpfs_size(&self, _: &Path) -> Option<u64> {
        self.0.is_multiple_of(2).then_some(self.0)
    }
}

const FIXTURES: &[&str] = &[
    include_str!("fixtures/ctr.json"),
    include_str!("fixtures/docker.json"),
    include_str!("fixtures/nerdctl.json"),
    include_str!("fixtures/cri-sandbox.json"),
    include_str!("fixtures/cri-member.json"),
    include_str!("fixtures/docker-privileged.json"),
];

/// Words that mean something somewhere, so that changes reach beyond the first check.
const WORDS: &[&str] = &[
    "",
    "/",
    "/a",
    "/a/../b",
    "..",
    "a:b:c",
    "-.slice:a:b",
    "/dev/null",
    "/dev/shm",
    "/proc/100/ns/pid",
    "/proc/100/ns/net",
    "/run/netns/a",
    "bind",
    "rbind",
    "ro",
    "rro",
    "rshared",
    "rslave",
    "idmap",
    "size=1",
    "tmpfs",
    "cgroup",
    "cgroup2",
    "erofs",
    "ext4",
    "overlay",
    "proc",
    "user",
    "pid",
    "network",
    "mount",
    "time",
    "0-3",
    "0-4294967295",
    "max",
    "1.0.0",
    "é",
    "\u{0}",
    "SCMP_ACT_NOTIFY",
    "dev.supermachine.cpus",
    "99999999999999999999",
    "cold",
    "512MiB",
    "rwm",
    "m",
    "c",
    "b",
];

fn word() -> impl Strategy<Value = String> {
    prop_oneof![4 => select(WORDS).prop_map(str::to_owned), 1 => ".{0,12}"]
}

const TYPES: &[&str] =
    &["bind", "bind", "bind", "none", "tmpfs", "proc", "cgroup", "cgroup2", "erofs", "ext4", "overlay", ""];

fn option() -> impl Strategy<Value = String> {
    let known = ["ro", "rw", "rro", "rbind", "bind", "nosuid", "rslave", "rprivate", "noexec", "relatime"];
    prop_oneof![9 => select(known.to_vec()).prop_map(str::to_owned), 1 => word()]
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        word().prop_map(Value::from),
    ]
}

/// Any JSON.
fn json() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((word(), inner), 0..4).prop_map(|list| Value::from(list.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// A change: the place, counted through the tree, and what to put there.
#[derive(Debug, Clone)]
enum Change {
    /// Another of the same type.
    Similar(String, i64),
    Replace(Value),
    Remove,
    Repeat,
}

fn change() -> impl Strategy<Value = (usize, Change)> {
    let change = prop_oneof![
        12 => (word(), prop_oneof![any::<i64>(), -3i64..300]).prop_map(|(word, number)| Change::Similar(word, number)),
        2 => leaf().prop_map(Change::Replace),
        1 => json().prop_map(Change::Replace),
        2 => Just(Change::Remove),
        1 => Just(Change::Repeat),
    ];
    (any::<usize>(), change)
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum::<usize>(),
        _ => 0,
    }
}

fn apply(value: &mut Value, mut place: usize, change: &Change) {
    if place == 0 {
        match (change, value) {
            (Change::Replace(with), value) => *value = with.clone(),
            (Change::Similar(word, _), Value::String(text)) => text.clone_from(word),
            (Change::Similar(_, number), Value::Number(old)) => *old = (*number).into(),
            (Change::Similar(..), Value::Bool(flag)) => *flag = !*flag,
            _ => {}
        }
        return;
    }
    place -= 1;
    match value {
        Value::Array(list) => {
            for index in 0..list.len() {
                let inner = size(&list[index]);
                if place < inner {
                    match change {
                        Change::Remove if place == 0 => drop(list.remove(index)),
                        Change::Repeat if place == 0 => list.push(list[index].clone()),
                        change => apply(&mut list[index], place, change),
                    }
                    return;
                }
                place -= inner;
            }
        }
        Value::Object(map) => {
            let keys: Vec<_> = map.keys().cloned().collect();
            for key in keys {
                let inner = size(&map[&key]);
                if place < inner {
                    match change {
                        Change::Remove if place == 0 => drop(map.remove(&key)),
                        change => apply(&mut map[&key], place, change),
                    }
                    return;
                }
                place -= inner;
            }
        }
        _ => {}
    }
}

fn mount(typ: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        typ: typ.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn plain() -> RootfsMount {
    mount("overlay", "overlay", &["lowerdir=/s/1/fs", "upperdir=/s/2/fs", "workdir=/s/2/work"])
}

fn composed() -> Vec<RootfsMount> {
    let overlay = ["upperdir={{ mount 0 }}/u", "workdir={{ mount 0 }}/w", "lowerdir={{ overlay 1 2 }}"];
    vec![
        mount("ext4", "/image0", &["loop"]),
        mount("erofs", "/image1", &["ro", "loop"]),
        mount("erofs", "/image2", &["ro", "loop", "device=/image3"]),
        mount("format/mkdir/overlay", "overlay", &overlay),
    ]
}

fn rootfs() -> impl Strategy<Value = Vec<RootfsMount>> {
    let types =
        ["overlay", "bind", "erofs", "ext4", "format/overlay", "format/mkdir/overlay", "mkfs/ext4", "/", ""];
    let source = prop_oneof![word(), Just("/image".to_owned()), Just("{{ mount 0 }}".to_owned())];
    let option = prop_oneof![
        word(),
        Just("lowerdir={{ overlay 0 1 }}".to_owned()),
        Just("upperdir={{ mount 0 }}/u".to_owned()),
        Just("device=/image2".to_owned()),
        Just("X-containerd.mkdir.path={{ mount 0 }}/u:755".to_owned()),
        "\\{\\{ (mount|overlay) -?[0-9]{1,20}( [0-9]{1,20})? \\}?\\}"
            .prop_map(|text| format!("lowerdir={text}")),
    ];
    let any = (select(types.to_vec()), source, word(), vec(option, 0..3), any::<bool>()).prop_map(
        |(typ, source, target, options, plain)| RootfsMount {
            typ: typ.to_owned(),
            source,
            target: if plain { String::new() } else { target },
            options,
        },
    );
    prop_oneof![
        3 => Just(vec![plain()]),
        2 => Just(composed()),
        1 => Just(vec![]),
        2 => vec(any, 0..4),
    ]
}

/// Plans for it, and says whether there is a plan.
fn ask(document: &Value, rootfs: &[RootfsMount], member: bool, seed: u64) -> Result<bool, TestCaseError> {
    let spec = match read::spec(document.to_string().as_bytes()) {
        Ok((spec, _)) => spec,
        Err(error) => {
            prop_assert!(!error.path().is_empty());
            return Ok(false);
        }
    };
    let mut config = Config::default();
    if seed & 1 == 1 {
        config.policy.host_namespaces = Reach::Guest;
        config.policy.host_kernel = Reach::Guest;
    }
    let pod = Pod {
        id: "p1".to_owned(),
        tasks: vec![
            Task { container: "p1".to_owned(), pid: 4100 },
            Task { container: "c0".to_owned(), pid: 100 },
        ],
        netns: None,
        free_drives: 3,
    };
    let request = Request {
        id: "c1",
        guest_id: "c1",
        namespace: "default",
        bundle: Path::new("/bundle"),
        share: Path::new("/share"),
        spec: &spec,
        rootfs,
        terminal: false,
        ordinal: seed as u32,
        config: &config,
        host: Host { cpus: (seed % 5) as u32, memory: seed, hostname: "h", files: &Any(seed >> 2) },
        pod: member.then_some(&pod),
    };
    if let Some(process) = spec.process() {
        let _ = exec(process, &spec, true);
    }
    if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        let _ = update(resources);
    }
    match plan(&request) {
        Ok(plan) => {
            check(&plan)?;
            Ok(true)
        }
        Err(error) => {
            prop_assert!(!error.path().is_empty(), "{error:?}");
            let path = error.path();
            let roots = [
                "config.json",
                "id",
                "rootfs",
                "root",
                "mounts",
                "process",
                "linux",
                "hooks",
                "annotations",
                "ociVersion",
                "hostname",
                "domainname",
                "dev.supermachine.",
                "solaris",
                "windows",
                "zos",
                "vm",
            ];
            prop_assert!(roots.iter().any(|root| path.starts_with(root)), "{path}");
            Ok(false)
        }
    }
}

/// What holds of every plan.
fn check(plan: &runtime_spec::Plan) -> Result<(), TestCaseError> {
    let guest = serde_json::to_value(&plan.guest).expect("JSON");
    let told: runtime_spec::plan::Guest = serde_json::from_value(guest.clone()).expect("what was told");
    prop_assert_eq!(&told, &plan.guest);
    let spec = &guest["spec"];
    for namespace in spec["linux"]["namespaces"].as_array().into_iter().flatten() {
        let path = namespace["path"].as_str().unwrap_or("/run/supermachine/ns/");
        prop_assert!(path.starts_with("/run/supermachine/ns/"), "{}", path);
        prop_assert!(namespace["type"] != "network");
    }
    prop_assert!(spec["root"]["path"].as_str().is_some_and(|path| path.starts_with("/run/supermachine/")));
    for bind in &plan.share.binds {
        prop_assert!(bind.place.starts_with("/share/c1/binds"));
        prop_assert!(bind.source.is_absolute());
    }
    for mount in &plan.share.rootfs {
        prop_assert!(mount.target.starts_with("/share/c1"));
    }
    for mount in &plan.guest.mounts {
        prop_assert!(mount.target.starts_with("/run/supermachine"));
    }
    if let Some(machine) = &plan.machine {
        prop_assert!(machine.size.cpus >= 1);
        prop_assert!(machine.size.memory >= 64 << 20 && machine.size.memory.is_multiple_of(2 << 20));
    }
    let mut serials: Vec<_> = plan.blocks.iter().map(|block| &block.serial).collect();
    prop_assert!(serials.iter().all(|serial| serial.len() <= 20));
    serials.dedup();
    prop_assert_eq!(serials.len(), plan.blocks.len());
    Ok(())
}

proptest! {
    #[test]
    fn any_json(document in json()) {
        ask(&document, &[], false, 0)?;
    }

    #[test]
    fn changed_specs(
        fixture in (0..FIXTURES.len()),
        changes in vec(change(), 0..3),
        rootfs in rootfs(),
        seed in any::<u64>(),
    ) {
        let fixture = FIXTURES[fixture];
        let mut document: Value = serde_json::from_str(fixture).expect("JSON");
        for (place, change) in &changes {
            let place = place % size(&document);
            apply(&mut document, place, change);
        }
        let member = fixture.contains("cri.container-name");
        ask(&document, &rootfs, member, seed)?;
    }

    #[test]
    fn any_mount(
        typ in select(TYPES), source in word(), destination in word(), options in vec(option(), 0..4),
        seed in any::<u64>(),
    ) {
        let mut document: Value = serde_json::from_str(FIXTURES[0]).expect("JSON");
        document["mounts"] = json!([{
            "type": typ, "source": source, "destination": format!("/{destination}"), "options": options,
        }]);
        ask(&document, &[plain()], false, seed)?;
    }

    #[test]
    fn any_configuration(text in ".{0,40}", key in word(), value in leaf(), foreign in any::<bool>()) {
        let texts = [text, format!("[vm]\n{key:?} = {value}"), format!("{key:?} = {value}")];
        for text in &texts {
            let _ = config::load(&[Layer { origin: "o", text, foreign }]);
        }
    }
}

use serde_json::json;

use super::*;
use crate::plan::DRIVES;
use crate::testing::Case;

fn mount(typ: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        typ: typ.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn case(mounts: &[RootfsMount]) -> Case {
    let mut case = Case::new();
    case.rootfs = mounts.to_vec();
    case
}

fn root(plan: &Plan) -> &str {
    plan.guest.spec.root().as_ref().unwrap().path().to_str().unwrap()
}

const SHARED: &str = "/run/supermachine/share/c1/rootfs";
const COMPOSED: &str = "/run/supermachine/containers/c1/rootfs";

#[test]
fn the_directory_of_the_spec() {
    let plan = Case::new().plan();
    assert_eq!((root(&plan), plan.share.rootfs[0].typ.as_str()), (SHARED, "bind"));
    assert_eq!(plan.share.rootfs[0].source, Source::Path("/bundle/rootfs".into()));
    assert_eq!(plan.share.rootfs[0].target, Path::new("/share/c1/rootfs"));
    for (root, path) in [
        (json!({ "path": "gone" }), "root.path"),
        (json!({ "path": "/file" }), "root.path"),
        (json!({ "path": "" }), "root.path"),
        (json!(null), "root.path"),
    ] {
        assert_eq!(Case::with(&json!({ "root": root })).error().path(), path);
    }
}

#[test]
fn read_only_is_the_guests_business() {
    for (root, readonly) in [(json!({ "readonly": true }), Some(true)), (json!({}), None)] {
        let plan = Case::with(&json!({ "root": root })).plan();
        assert_eq!(plan.guest.spec.root().as_ref().unwrap().readonly(), readonly);
    }
    let mut without = case(&[mount("bind", "/dir", &["rbind"])]);
    without.spec["root"] = json!(null);
    assert_eq!(without.plan().guest.spec.root().as_ref().unwrap().readonly(), Some(false));
}

#[test]
fn the_host_mounts_what_snapshotters_yield() {
    for (typ, source, options) in [
        (
            "overlay",
            "overlay",
            vec!["index=off", "upperdir=/s/1/fs", "workdir=/s/1/work", "lowerdir=/s/2/fs:/s/3/fs"],
        ),
        ("bind", "/dir", vec!["rbind", "rw"]),
        ("btrfs", "/dir", vec!["subvolid=5"]),
    ] {
        let plan = case(&[mount(typ, source, &options)]).plan();
        assert_eq!(root(&plan), SHARED, "{typ}");
        let made = &plan.share.rootfs[0];
        assert_eq!(
            (made.typ.as_str(), &made.options),
            (typ, &options.iter().map(|o| (*o).to_owned()).collect())
        );
        assert_eq!((plan.blocks.len(), plan.guest.mounts.len()), (0, 0));
    }
}

#[test]
fn mounts_over_each_other() {
    let mut second = mount("bind", "/dir", &["rbind"]);
    second.target = "/var/lib".to_owned();
    let plan = case(&[mount("bind", "/dir", &["rbind"]), second]).plan();
    let targets: Vec<_> = plan.share.rootfs.iter().map(|made| made.target.to_str().unwrap()).collect();
    assert_eq!(targets, ["/share/c1/rootfs", "/share/c1/rootfs/var/lib"]);
}

#[test]
fn a_disk_is_a_disk() {
    // What the devmapper and blockfile snapshotters yield.
    for (source, options, readonly) in [
        ("/dev/mapper/snap", vec!["discard"], false),
        ("/rw.img", vec!["loop"], false),
        ("/rw.img", vec!["ro"], true),
    ] {
        let plan = case(&[mount("ext4", source, &options)]).plan();
        assert_eq!(root(&plan), COMPOSED);
        assert_eq!(
            plan.blocks,
            [Block { serial: "c0b0".to_owned(), source: BlockSource::Path(source.into()), readonly }]
        );
        assert_eq!(plan.guest.mounts[0].source, Source::Disk("c0b0".to_owned()));
        assert!(!plan.guest.mounts[0].options.contains(&"loop".to_owned()));
        assert_eq!(plan.share.rootfs, []);
    }
}

#[test]
fn images_under_a_writable_image_are_composed_in_the_guest() {
    // What the erofs snapshotter yields with a writable image.
    let list = [
        mount("ext4", "/rw.img", &["rw", "loop"]),
        mount("erofs", "/image.erofs", &["ro", "loop"]),
        mount("erofs", "/image2.erofs", &["ro", "loop", "device=/image.erofs"]),
        mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ overlay 1 2 }}",
            ],
        ),
    ];
    let plan = case(&list).plan();
    assert_eq!((root(&plan), plan.share.rootfs.len(), plan.blocks.len()), (COMPOSED, 0, 4));
    let layer = |n: u32| format!("/run/supermachine/containers/c1/layers/{n}");
    let targets: Vec<_> = plan.guest.mounts.iter().map(|made| made.target.display().to_string()).collect();
    assert_eq!(targets, [layer(0), layer(1), layer(2), COMPOSED.to_owned()]);
    let overlay = &plan.guest.mounts[3];
    assert_eq!(
        overlay.options,
        [
            format!("workdir={}/work", layer(0)),
            format!("upperdir={}/upper", layer(0)),
            format!("lowerdir={}:{}", layer(1), layer(2)),
        ]
    );
    let made: Vec<_> =
        overlay.mkdir.iter().map(|made| (made.path.display().to_string(), made.mode)).collect();
    assert_eq!(made, [(format!("{}/upper", layer(0)), 0o755), (format!("{}/work", layer(0)), 0o755)]);
    assert_eq!(plan.guest.mounts[2].devices, [Source::Disk("c0b3".to_owned())]);
    let writable: Vec<_> = plan.blocks.iter().map(|block| !block.readonly).collect();
    assert_eq!(writable, [true, false, false, false]);
}

#[test]
fn a_directory_of_an_image() {
    // What the erofs snapshotter yields for an image without layers, with a writable one.
    let list = [
        mount("ext4", "/rw.img", &["rw", "loop"]),
        mount(
            "format/mkdir/bind",
            "{{ mount 0 }}/upper",
            &["X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rbind"],
        ),
    ];
    let plan = case(&list).plan();
    assert_eq!((root(&plan), plan.share.rootfs.len(), plan.blocks.len()), (COMPOSED, 0, 1));
    let upper = "/run/supermachine/containers/c1/layers/0/upper";
    assert_eq!(plan.guest.mounts[1].source, Source::Path(upper.into()));
    assert_eq!(plan.guest.mounts[1].mkdir[0].path, Path::new(upper));
}

#[test]
fn images_under_a_directory_of_the_host_are_composed_there() {
    // What the erofs snapshotter yields by default.
    let list = [
        mount("erofs", "/image.erofs", &["ro", "loop"]),
        mount(
            "format/overlay",
            "overlay",
            &["workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir={{ mount 0 }}"],
        ),
    ];
    let plan = case(&list).plan();
    assert_eq!((root(&plan), plan.blocks.len(), plan.guest.mounts.len()), (SHARED, 0, 0));
    assert_eq!(plan.share.rootfs[0].target, Path::new("/share/c1/layers/0"));
    assert_eq!(plan.share.rootfs[0].options, ["ro", "loop"]);
    assert_eq!(plan.share.rootfs[1].options[2], "lowerdir=/share/c1/layers/0");
}

/// A machine takes as many disks as it has drives, and one that runs as many as are left.
#[test]
fn images_that_the_machine_cannot_have_are_composed_on_the_host() {
    let compose = |layers: usize| {
        let mut list = vec![mount("ext4", "/rw.img", &["loop"])];
        list.extend((0..layers).map(|_| mount("erofs", "/image.erofs", &["ro", "loop"])));
        let lower = format!("lowerdir={{{{ overlay 1 {layers} }}}}");
        let upper = ["workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", lower.as_str()];
        list.push(mount("format/overlay", "overlay", &upper));
        list
    };
    for (layers, free, at) in [
        (1, None, COMPOSED),
        (DRIVES - 1, None, COMPOSED),
        (DRIVES, None, SHARED),
        (1, Some(2), COMPOSED),
        (2, Some(2), SHARED),
        (1, Some(0), SHARED),
    ] {
        let mut case = case(&compose(layers));
        if let Some(free_drives) = free {
            case.spec["annotations"] = json!({ "io.containerd.runc.v2.group": "pod" });
            let namespaces = case.spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.push(json!({ "type": "network", "path": "/run/netns/a" }));
            let netns = Some("/run/netns/a".into());
            case.pod = Some(crate::host::Pod { id: "pod".to_owned(), tasks: Vec::new(), netns, free_drives });
        }
        let plan = case.plan();
        let on_host = at == SHARED;
        assert_eq!((root(&plan), plan.blocks.is_empty()), (at, on_host), "{layers} {free:?}");
        let mounted = if on_host { plan.share.rootfs.len() } else { plan.guest.mounts.len() };
        assert_eq!(mounted, layers + 2);
    }
}

#[test]
fn lists_that_make_no_root() {
    for (list, path) in [
        (vec![mount("nfs", "server:/", &[])], "rootfs[0]"),
        (vec![mount("fuse3.fuse-overlayfs", "overlay", &[])], "rootfs[0]"),
        (vec![mount("mkfs/ext4", "/rw.img", &[])], "rootfs[0]"),
        (vec![mount("", "", &[])], "rootfs[0]"),
        (vec![mount("bind", "/gone", &["rbind"])], "rootfs[0].source"),
        (vec![mount("bind", "dir", &["rbind"])], "rootfs[0].source"),
        (vec![mount("erofs", "/gone.erofs", &[])], "rootfs[0].source"),
        (vec![mount("erofs", "/dir", &[])], "rootfs[0].source"),
        (vec![mount("erofs", "/image.erofs", &["device=/gone"])], "rootfs[0].device"),
        (
            vec![
                mount("erofs", "/image.erofs", &[]),
                mount("format/overlay", "overlay", &["lowerdir={{ mount 1 }}"]),
            ],
            "rootfs[1].options[0]",
        ),
        (vec![mount("overlay", "overlay", &["lowerdir=/a:/b", "uidmap=0:1:2"])], "rootfs[0].options[1]"),
        (vec![mount("erofs", "/image.erofs", &["X-containerd.dmverity=x"])], "rootfs[0].options"),
        (vec![mount("ext4", "/rw.img", &["colour=blue"])], "rootfs[0].options"),
        (vec![mount("mkdir/overlay", "overlay", &["X-containerd.mkdir.path=/a:x"])], "rootfs[0].options[0]"),
    ] {
        assert_eq!(case(&list).error().path(), path, "{list:?}");
    }
    for target in ["../x", "{{ mount 0 }}"] {
        let mut out = mount("bind", "/dir", &[]);
        out.target = target.to_owned();
        assert_eq!(case(&[out]).error().path(), "rootfs[0].target", "{target}");
    }
}

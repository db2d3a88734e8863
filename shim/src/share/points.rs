//! Mount points of a container that goes on from a checkpoint. When it was made, its agent made those that its image does not
//! have; a root without that layer lacks them, and its guest would find the mounts gone with the directories that they are on.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use pathrs::Root;
use pathrs::error::{Error, ErrorKind};
use pathrs::flags::OpenFlags;
use runtime_spec::plan::Bind;

/// Makes what is missing of them in `root`, as its container sees it: no link leads out of it.
pub fn make(root: &Path, spec: &Spec, binds: &[Bind]) -> io::Result<()> {
    let root = Root::open(root).map_err(|error| told(root, &error))?;
    for (path, directory) in wanted(spec, binds) {
        make_one(&root, &path, directory).map_err(|error| told(&path, &error))?;
    }
    Ok(())
}

fn told(path: &Path, error: &Error) -> io::Error {
    let kind = match error.kind() {
        ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno).kind(),
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("{}: {error}", path.display()))
}

/// Where something is mounted on the root itself, relative to it, and whether that is a directory.
fn wanted(spec: &Spec, binds: &[Bind]) -> Vec<(PathBuf, bool)> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    // One on the root has no name there.
    let named = mounts.iter().map(|mount| (mount, below(mount.destination())));
    let all: Vec<_> = named.filter(|(_, path)| path.parent().is_some()).collect();
    let is_file = |mount: &Mount| {
        let name = mount.source().as_deref().and_then(Path::file_name);
        mount.typ().as_deref() == Some("bind")
            && binds.iter().any(|bind| !bind.directory && bind.place.file_name() == name)
    };
    let on_root = |path: &Path| !all.iter().any(|(_, other)| path != other && path.starts_with(other));
    let points = all.iter().filter(|(_, path)| on_root(path));
    points.map(|(mount, path)| (path.clone(), !is_file(mount))).collect()
}

/// Relative to the root, without what means nothing.
fn below(destination: &Path) -> PathBuf {
    destination.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

fn make_one(root: &Root, path: &Path, directory: bool) -> Result<(), Error> {
    if directory {
        return root.mkdir_all(path, &Permissions::from_mode(0o755)).map(drop);
    }
    match root.resolve(path) {
        Err(error) if error.kind() == ErrorKind::OsError(Some(libc::ENOENT)) => {
            if let Some(above) = path.parent() {
                root.mkdir_all(above, &Permissions::from_mode(0o755))?;
            }
            root.create_file(path, OpenFlags::O_EXCL, &Permissions::from_mode(0o644)).map(drop)
        }
        found => found.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn spec(mounts: &[(&str, &str, &str)]) -> Spec {
        let mounts: Vec<_> = mounts
            .iter()
            .map(|(typ, source, destination)| json!({ "type": typ, "source": source, "destination": destination }))
            .collect();
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "mounts": mounts })).unwrap()
    }

    fn file(place: &str) -> Bind {
        Bind {
            source: "/host".into(),
            place: place.into(),
            directory: false,
            recursive: false,
            follows: false,
            access: runtime_spec::plan::Access::ReadWrite,
        }
    }

    #[test]
    fn what_is_mounted_on_the_root_is_made_there() {
        let scratch = std::env::temp_dir().join(format!("shim-points-{}", std::process::id()));
        let (root, outside) = (scratch.join("root"), scratch.join("outside"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::create_dir(root.join("there")).unwrap();
        symlink("/there", root.join("link")).unwrap();
        symlink("../../outside", root.join("out")).unwrap();
        symlink("/nowhere", root.join("dangling")).unwrap();
        let spec_of = spec(&[
            ("proc", "proc", "/proc"),
            ("bind", "/run/binds/0", "/etc/resolv.conf"),
            ("bind", "/run/binds/1", "/data/deep"),
            ("bind", "/run/binds/2", "/data/deep/below"),
            ("tmpfs", "tmpfs", "/link/inside"),
            ("tmpfs", "tmpfs", "/"),
            ("tmpfs", "tmpfs", "/../up"),
        ]);
        for _ in 0..2 {
            make(&root, &spec_of, &[file("binds/0")]).unwrap();
        }
        for directory in ["proc", "data/deep", "there/inside", "up"] {
            assert!(root.join(directory).is_dir(), "{directory}");
        }
        assert!(root.join("etc/resolv.conf").is_file());
        assert!(!root.join("data/deep/below").exists(), "that is not the root's");
        // What a link leads to is in the root, or there is an error.
        make(&root, &spec(&[("tmpfs", "tmpfs", "/out/x")]), &[]).unwrap_err();
        make(&root, &spec(&[("tmpfs", "tmpfs", "/dangling")]), &[]).unwrap_err();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        fs::remove_dir_all(&scratch).unwrap();
    }
}

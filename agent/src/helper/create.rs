//! A container: mounts that it needs, what the spec leaves to the agent, then libcontainer.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{chown, fchown};
use std::os::unix::net::UnixListener;
use std::path::{Component, Path};

use anyhow::{Context, Result, anyhow, bail};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};
use runtime_spec::plan::GuestDevice;

use super::engine::{Engine, ours};
use super::finish::{Finish, words};
use super::{Create, NOT_STARTED, Streams, home, mounts, receive};
use crate::machine::disks;

/// Makes it. Its process waits to be started.
pub fn create(mut create: Create, streams: Streams) -> Result<(i32, Option<OwnedFd>)> {
    if let Some(shm) = &create.guest.shm {
        mounts::shm(shm)?;
    }
    for mount in &create.guest.mounts {
        mounts::one(mount)?;
    }
    mounts::go_into_binds(&create.guest.spec);
    let devices = std::mem::take(&mut create.guest.devices);
    add_disks(&mut create.guest.spec, &devices)?;
    let engine = prepare(&mut create)?;
    let spec = &create.guest.spec;
    let user = spec.process().as_ref().map(|process| (process.user().uid(), process.user().gid()));
    let (uid, gid) = user.unwrap_or((0, 0));
    let has_terminal = spec.process().as_ref().is_some_and(|process| process.terminal() == Some(true));
    fs::create_dir_all(&create.bundle).context("making the bundle")?;
    spec.save(create.bundle.join("config.json")).context("writing the bundle")?;

    let console = create.bundle.join("console");
    let listener = if has_terminal {
        Some(UnixListener::bind(&console).context("making the console's socket")?)
    } else {
        None
    };
    let mut builder = ContainerBuilder::new(create.id.clone(), SyscallType::default())
        .with_root_path(&create.states)
        .and_then(ContainerBuilder::validate_id)?
        .with_executor(engine)
        .with_console_socket(has_terminal.then_some(console.as_path()));
    if !has_terminal {
        for stream in [&streams.stdin, &streams.stdout, &streams.stderr] {
            // As runc does, so that a process can open its streams again by name.
            let _ = fchown(stream, Some(uid), Some(gid));
        }
        builder = builder.with_stdin(streams.stdin).with_stdout(streams.stdout).with_stderr(streams.stderr);
    }
    let made = builder.as_init(&create.bundle).with_systemd(false).with_detach(true).build();
    let container = made.map_err(|error| explain(&anyhow!(error)))?;
    let pid = container.pid().context("the container has no process")?.as_raw();
    let master = match listener {
        None => None,
        Some(listener) => {
            let (socket, _) = listener.accept().context("waiting for the console")?;
            let (_, mut fds) = receive(socket.as_raw_fd(), 1).context("waiting for the console")?;
            let _ = chown(format!("/proc/{pid}/fd/0"), Some(uid), None);
            Some(fds.pop().context("the console has no terminal")?)
        }
    };
    Ok((pid, master))
}

/// Our own words, or the crate's.
fn explain(error: &anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    match ours(&text) {
        Some(ours) => anyhow!("{NOT_STARTED}: {ours}"),
        None => anyhow!("{text}"),
    }
}

/// Takes out of the spec what is done here.
fn prepare(create: &mut Create) -> Result<Engine> {
    let spec = &mut create.guest.spec;
    let root = spec.root().as_ref().context("the container has no root")?.path().clone();
    let root = home::place(&root).with_context(|| format!("opening the root {}", root.display()))?;
    let seccomp = spec.linux_mut().as_mut().and_then(|linux| {
        linux.set_cgroups_path(Some(create.cgroup.clone()));
        // The agent has limited the cgroup already.
        linux.set_resources(None);
        linux.seccomp_mut().take()
    });
    let mounts = spec.mounts().clone().unwrap_or_default();
    let Some(process) = spec.process_mut() else { bail!("the container has no process") };
    let mut environment = process.env().clone().unwrap_or_default();
    home::complete(&mut environment, &root, process.user().uid());
    process.set_env(Some(environment.clone()));
    make_working_directory(&root, process.cwd(), &mounts)?;
    let size = create.size.or_else(|| {
        let size = process.console_size()?;
        Some((u16::try_from(size.width()).ok()?, u16::try_from(size.height()).ok()?))
    });
    let finish = Finish::new(process, &environment, seccomp)?;
    process.set_capabilities(None);
    process.set_apparmor_profile(None);
    Ok(Engine { finish, size: size.filter(|_| process.terminal() == Some(true)) })
}

/// The working directory is made if it is not there, as runc does; in a bind, where it will be seen. Other mounts begin
/// empty or have nothing to be made in.
fn make_working_directory(root: &File, path: &Path, mounts: &[Mount]) -> Result<()> {
    let below = |mount: &Mount| path.strip_prefix(mount.destination()).map(Path::to_owned);
    // What is mounted later covers what was mounted before.
    let Some((mount, rest)) = mounts.iter().rev().find_map(|mount| Some((mount, below(mount).ok()?))) else {
        return make_directory(root, path, path);
    };
    let is_bind = |option: &String| option == "bind" || option == "rbind";
    let source = mount.source().as_ref().filter(|_| mount.options().iter().flatten().any(is_bind));
    // One that is not there, or a file, is refused when it is mounted.
    match source.map(File::open) {
        Some(Ok(source)) if source.metadata().is_ok_and(|found| found.is_dir()) => {
            make_directory(&source, &rest, path)
        }
        _ => Ok(()),
    }
}

/// Makes the directory at `path` below `root`, which is `named` so in the spec. What cannot be made fails when it is
/// entered; only of a file in its place the words then do not tell.
fn make_directory(root: &File, path: &Path, named: &Path) -> Result<()> {
    let how = |flags| {
        OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut so_far = std::path::PathBuf::from(".");
    let mut parent = root.as_fd().try_clone_to_owned().context("duplicating a descriptor of the root")?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        so_far.push(name);
        let there = openat2(root, &so_far, how(directory)).or_else(|errno| {
            if errno == Errno::ENOENT {
                mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
                return openat2(root, &so_far, how(directory));
            }
            Err(errno)
        });
        match there {
            Ok(fd) => parent = fd,
            Err(Errno::ENOTDIR) => {
                bail!("{NOT_STARTED}: process.cwd {}: {}", named.display(), words(Errno::ENOTDIR));
            }
            Err(_) => break,
        }
    }
    Ok(())
}

/// Nodes for disks of the machine.
fn add_disks(spec: &mut Spec, asked: &[GuestDevice]) -> Result<()> {
    if asked.is_empty() {
        return Ok(());
    }
    let linux = spec.linux_mut().as_mut().context("the spec has no linux")?;
    let mut nodes = linux.devices().clone().unwrap_or_default();
    for device in asked {
        let disk = disks::find(&device.serial)?;
        let mut node = LinuxDevice::default();
        node.set_path(device.path.clone());
        node.set_typ(LinuxDeviceType::B);
        node.set_major(disk.major);
        node.set_minor(disk.minor);
        node.set_file_mode(device.mode.map(|mode| mode & 0o7777).or(Some(0o660)));
        node.set_uid(device.uid.or(Some(0)));
        node.set_gid(device.gid.or(Some(0)));
        nodes.push(node);
    }
    linux.set_devices(Some(nodes));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_directory_is_made_where_it_will_be_seen_unless_a_file_is_in_its_place() {
        let path = std::env::temp_dir().join(format!("working-directory-{}", std::process::id()));
        for directory in ["root", "volume", "other"] {
            fs::create_dir_all(path.join(directory)).unwrap();
        }
        for file in ["root/file", "volume/file"] {
            fs::write(path.join(file), "").unwrap();
        }
        let mount = |source: &str, destination: &str, typ: &str| {
            let mut mount = Mount::default();
            mount.set_source(Some(path.join(source))).set_destination(destination.into());
            mount.set_typ(Some(typ.to_owned()));
            mount.set_options(Some(vec![if typ == "bind" { "rbind" } else { "nosuid" }.to_owned()]));
            mount
        };
        let mounts = [
            mount("other", "/v/hidden", "bind"),
            mount("volume", "/v", "bind"),
            mount("volume/file", "/single", "bind"),
            mount("tmpfs", "/fresh", "tmpfs"),
        ];
        let root = File::open(path.join("root")).unwrap();
        let make = |to: &str| make_working_directory(&root, Path::new(to), &mounts);
        for (to, made) in [
            ("/a/b", "root/a/b"),
            ("/a/b/../c", "root/a/b/c"),
            ("/", "root"),
            ("/v", "volume"),
            ("/v/a/b", "volume/a/b"),
            ("/v/hidden/x", "volume/hidden/x"),
        ] {
            make(to).unwrap();
            assert!(path.join(made).is_dir(), "{to}");
        }
        for to in ["/fresh/x", "/single/x"] {
            make(to).unwrap();
        }
        for place in ["/file", "/file/below", "/v/file/below"] {
            let error = make(place).unwrap_err().to_string();
            assert!(error.contains(place) && error.contains("not a directory"), "{error}");
        }
        let mut found: Vec<_> =
            fs::read_dir(path.join("root")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, ["a", "file"]);
        fs::remove_dir_all(path).unwrap();
    }
}

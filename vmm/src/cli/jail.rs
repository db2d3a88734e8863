//! `--jail`: which paths of a command line are in it, and where.
//!
//! Whatever is opened by path once and for all is opened inside too, so there is one rule: kernel, initrd,
//! disks, shares and the directories of sockets are entries. The console, descriptors, the network namespace
//! and, in it, taps are opened before.

use std::os::fd::RawFd;
use std::path::PathBuf;

#[cfg(target_os = "linux")]
pub(super) use linux::{close_inherited, enter, filter, join};

#[cfg(not(target_os = "linux"))]
use super::options::Options;

/// A network namespace by name or by descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Netns {
    Path(PathBuf),
    Fd(RawFd),
}

impl Netns {
    pub(super) fn parse(text: &str) -> Self {
        match text.strip_prefix("fd:").and_then(|number| number.parse().ok()) {
            Some(fd) => Self::Fd(fd),
            None => Self::Path(text.into()),
        }
    }
}

/// Nothing can be closed here.
#[cfg(not(target_os = "linux"))]
pub(super) fn close_inherited(_options: &Options) -> anyhow::Result<()> {
    Ok(())
}

/// There is no filter here, and no jail that would want one.
#[cfg(not(target_os = "linux"))]
pub(super) fn filter() -> anyhow::Result<()> {
    Ok(())
}

/// There is none to join here.
#[cfg(not(target_os = "linux"))]
pub(super) fn join(_options: &Options) -> anyhow::Result<()> {
    Ok(())
}

/// There is no jail here.
#[cfg(not(target_os = "linux"))]
pub(super) fn enter(options: &mut Options, _netns: ()) -> anyhow::Result<()> {
    if options.jail.is_some() || options.netns.is_some() || options.cgroup.is_some() {
        anyhow::bail!("cannot jail a machine: this system has neither mount namespaces nor cgroups");
    }
    Ok(())
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::path::{Path, PathBuf};

    use anyhow::{anyhow, bail};
    use nix::sched::{CloneFlags, setns};
    use vmm::hypervisor::check;
    use vmm::hypervisor::kvm::DEVICE;
    use vmm::jail::{self, Access, Entry, FILE_SERVER, Jail};

    use super::super::control::Control;
    use super::super::net::Port;
    use super::super::options::{Options, Origin};
    use super::Netns;

    fn open(netns: &Netns) -> anyhow::Result<OwnedFd> {
        match netns {
            Netns::Path(path) => File::open(path)
                .map(OwnedFd::from)
                .map_err(|error| anyhow!("cannot open the network namespace {}: {error}", path.display())),
            // SAFETY: it was given for this use, once, by whoever started this process; should it not be
            // open, joining it fails.
            Netns::Fd(fd) => Ok(unsafe { OwnedFd::from_raw_fd(*fd) }),
        }
    }

    /// Closes what this process inherited and was not told of.
    pub(in crate::cli) fn close_inherited(options: &Options) -> anyhow::Result<()> {
        let mut keep = Vec::new();
        if let Some(Control::Fd(fd)) = options.control {
            keep.push(fd);
        }
        if let Some(Netns::Fd(fd)) = options.netns {
            keep.push(fd);
        }
        keep.extend(options.taps.iter().flat_map(Port::descriptors));
        jail::close_inherited(&keep).map_err(|error| anyhow!("cannot close inherited descriptors: {error}"))
    }

    /// From here on, this process makes the calls of a running machine only.
    pub(in crate::cli) fn filter() -> anyhow::Result<()> {
        Ok(vmm::seccomp::apply()?)
    }

    /// Joins the network namespace, if there is one to join, for what has to be opened in it.
    pub(in crate::cli) fn join(options: &Options) -> anyhow::Result<Option<OwnedFd>> {
        if options.jail.is_none() {
            return Ok(None);
        }
        let netns = options.netns.as_ref().map(open).transpose()?;
        if let Some(netns) = &netns {
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(|error| anyhow!("cannot join the network namespace: {error}"))?;
        }
        Ok(netns)
    }

    /// Enters the jail, if there is to be one, and makes the paths of the options those inside.
    pub(in crate::cli) fn enter(options: &mut Options, network: Option<OwnedFd>) -> anyhow::Result<()> {
        let Some(root) = options.jail.clone() else {
            if options.netns.is_some() || options.cgroup.is_some() {
                bail!("--netns and --cgroup are doors of a jail: give --jail DIR too");
            }
            return Ok(());
        };
        if !Path::new(DEVICE).exists() {
            // Said here, since the check has nothing to look at in a jail.
            let report = check::host(&check::Host::default());
            bail!("there is no {DEVICE} to take along; {}; see supermachine-vmm check", report.verdict());
        }
        let capabilities = if options.shares.is_empty() { Vec::new() } else { FILE_SERVER.to_vec() };
        let entries = entries(options);
        Jail { root, entries, network, cgroup: options.cgroup.clone(), capabilities }.enter()?;
        Ok(())
    }

    /// Moves the options' paths into the jail, and says what must be there.
    fn entries(options: &mut Options) -> Vec<Entry> {
        use Access::{ReadOnly, ReadWrite};
        let mut entries = vec![Entry::same(DEVICE, ReadWrite)];
        let mut place = |path: &mut PathBuf, place: PathBuf, access| {
            entries.push(Entry { source: path.clone(), place: place.clone(), access });
            *path = place;
        };
        match &mut options.origin {
            Origin::Boot(boot) => {
                place(&mut boot.kernel, "/boot/kernel".into(), ReadOnly);
                if let Some(initrd) = &mut boot.initrd {
                    place(initrd, "/boot/initrd".into(), ReadOnly);
                }
            }
            Origin::Snapshot(directory) => place(directory, "/snapshot".into(), ReadOnly),
        }
        let disks = options.disks.iter_mut().chain(options.drives.iter_mut().flatten());
        for (index, disk) in disks.enumerate() {
            // Without a serial number the guest is told its name.
            let name = disk.path.file_name().unwrap_or("disk".as_ref()).to_owned();
            let access = if disk.read_only { ReadOnly } else { ReadWrite };
            place(&mut disk.path, Path::new(&format!("/disk/{index}")).join(name), access);
        }
        for (index, share) in options.shares.iter_mut().enumerate() {
            let access = if share.read_only { ReadOnly } else { ReadWrite };
            place(&mut share.directory, format!("/share/{index}").into(), access);
        }
        if let Some(directory) = &mut options.vsock {
            place(directory, "/vsock".into(), ReadWrite);
        }
        if let Some(Control::Path(path)) = &mut options.control {
            // Its directory, so that it can be removed at the end.
            let name = path.file_name().unwrap_or_default().to_owned();
            let mut directory = match path.parent() {
                Some(parent) if parent != Path::new("") => parent.to_owned(),
                _ => ".".into(),
            };
            place(&mut directory, "/control".into(), ReadWrite);
            *path = directory.join(name);
        }
        // Of this process only: its descriptors, by which the file server opens files again; its mounts; and
        // how much memory it takes.
        if !options.shares.is_empty() {
            entries.extend(["/proc/self/fd", "/proc/self/mountinfo"].map(|path| Entry::same(path, ReadOnly)));
        }
        // And which of its memory there is to save.
        if options.control.is_some() {
            entries
                .extend(["/proc/self/smaps", "/proc/self/pagemap"].map(|path| Entry::same(path, ReadOnly)));
        }
        entries
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn paths_move_into_the_jail() {
            use Access::{ReadOnly, ReadWrite};

            let args = [
                "--kernel",
                "/k",
                "--initrd",
                "/i",
                "--block",
                "/d/a.img:ro",
                "--share",
                "x/y=/srv",
                "--vsock",
                "/v",
                "--control",
                "/run/m/sock",
            ];
            let mut options = super::super::super::options::parse(lexopt::Parser::from_args(args)).unwrap();
            let entries = entries(&mut options);
            let found: Vec<_> = entries
                .iter()
                .map(|entry| (entry.source.to_str().unwrap(), entry.place.to_str().unwrap(), entry.access))
                .collect();
            assert_eq!(
                found,
                [
                    ("/dev/kvm", "/dev/kvm", ReadWrite),
                    ("/k", "/boot/kernel", ReadOnly),
                    ("/i", "/boot/initrd", ReadOnly),
                    ("/d/a.img", "/disk/0/a.img", ReadOnly),
                    ("/srv", "/share/0", ReadWrite),
                    ("/v", "/vsock", ReadWrite),
                    ("/run/m", "/control", ReadWrite),
                    ("/proc/self/fd", "/proc/self/fd", ReadOnly),
                    ("/proc/self/mountinfo", "/proc/self/mountinfo", ReadOnly),
                    ("/proc/self/smaps", "/proc/self/smaps", ReadOnly),
                    ("/proc/self/pagemap", "/proc/self/pagemap", ReadOnly),
                ]
            );
            assert_eq!(options.control, Some(Control::Path("/control/sock".into())));
            assert_eq!(options.disks[0].path, Path::new("/disk/0/a.img"));
            assert_eq!(options.shares[0].directory, Path::new("/share/0"));
        }

        #[test]
        fn a_network_namespace_has_a_path_or_a_number() {
            for (text, netns) in [
                ("/run/netns/a", Netns::Path("/run/netns/a".into())),
                ("fd:9", Netns::Fd(9)),
                ("fd:x", Netns::Path("fd:x".into())),
            ] {
                assert_eq!(Netns::parse(text), netns);
            }
        }
    }
}

//! The last steps before a program runs, the same for a container's own process and for those beside it: privileges
//! are given up, the program is found, and what cannot be run is told in runc's words, which clients know.
//!
//! [`Finish::confine`] and [`Finish::find`] come before the container is told to be created, [`Finish::execute`] when
//! it is started.

use std::ffi::{CStr, CString};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use caps::{CapSet, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use nix::errno::Errno;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxSeccomp, Process};

use super::seccomp;

/// What a process's end is if its program cannot be run after all.
const NOT_RUN: i32 = 255;

/// What is left to do.
#[derive(Clone)]
pub struct Finish {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    path: String,
    capabilities: LinuxCapabilities,
    no_new_privileges: bool,
    seccomp: Option<LinuxSeccomp>,
}

impl Finish {
    /// For `process`, in its container's `seccomp` profile, with the whole `environment`.
    pub fn new(process: &Process, environment: &[String], seccomp: Option<LinuxSeccomp>) -> Result<Self> {
        let strings = |list: &[String]| -> Result<Vec<CString>> {
            list.iter().map(|text| Ok(CString::new(text.as_str())?)).collect()
        };
        let path = environment.iter().rev().find_map(|entry| entry.strip_prefix("PATH="));
        let mut none = LinuxCapabilities::default();
        for clear in [
            LinuxCapabilities::set_bounding,
            LinuxCapabilities::set_effective,
            LinuxCapabilities::set_permitted,
            LinuxCapabilities::set_inheritable,
            LinuxCapabilities::set_ambient,
        ] {
            clear(&mut none, None);
        }
        Ok(Self {
            arguments: strings(process.args().as_deref().unwrap_or_default()).context("arguments")?,
            environment: strings(environment).context("environment")?,
            path: path.unwrap_or_default().to_owned(),
            // Who names no capabilities has none.
            capabilities: process.capabilities().clone().unwrap_or(none),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
        })
    }

    /// Gives up capabilities; and takes on the seccomp profile, if that takes one of them.
    pub fn confine(&self) -> Result<()> {
        if !self.no_new_privileges
            && let Some(profile) = &self.seccomp
        {
            seccomp::load(profile)?;
        }
        self.drop_capabilities().context("giving up capabilities")
    }

    /// After the user has changed, and with all capabilities in the permitted set.
    fn drop_capabilities(&self) -> Result<()> {
        let set = |list: &Option<Capabilities>| -> CapsHashSet {
            list.iter().flatten().map(CapabilityExt::to_cap).collect()
        };
        let wanted = &self.capabilities;
        let permitted = set(wanted.permitted());
        let effective = &set(wanted.effective()) & &permitted;
        let inheritable = set(wanted.inheritable());
        let ambient = &(&set(wanted.ambient()) & &permitted) & &inheritable;
        let all = caps::read(None, CapSet::Permitted)?;
        caps::set(None, CapSet::Effective, &all)?;
        let bounding = set(wanted.bounding());
        for capability in &caps::read(None, CapSet::Bounding)? - &bounding {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
        caps::set(None, CapSet::Inheritable, &inheritable)?;
        caps::set(None, CapSet::Effective, &(&effective & &all))?;
        caps::set(None, CapSet::Permitted, &(&permitted & &all))?;
        caps::set(None, CapSet::Ambient, &(&ambient & &all))?;
        Ok(())
    }

    /// The program, looked for as the user will.
    pub fn find(&self) -> Result<PathBuf> {
        let Some(name) = self.arguments.first() else { bail!("there is nothing to run") };
        look_for(&name.to_string_lossy(), &self.path)
    }

    /// Becomes the program. Returns why not.
    pub fn execute(&self) -> anyhow::Error {
        match self.try_execute() {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn try_execute(&self) -> Result<std::convert::Infallible> {
        let program = self.find()?;
        if self.no_new_privileges {
            // SAFETY: the call takes four numbers.
            Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
            if let Some(profile) = &self.seccomp {
                seccomp::load(profile)?;
            }
        }
        forget_signals();
        let path = CString::new(program.as_os_str().as_bytes())?;
        let Err(errno) = nix::unistd::execve(&path, &self.arguments, &self.environment);
        bail!("exec {}: {}", program.display(), words(errno))
    }

    /// [`Self::execute`] for a process that has nobody to tell any more but whoever reads its standard error.
    pub fn execute_or_exit(&self) -> ! {
        let error = self.execute();
        let _ = writeln!(std::io::stderr(), "{error:#}");
        // SAFETY: the process ends; nothing of its is needed any more.
        unsafe { libc::_exit(NOT_RUN) }
    }
}

/// No program begins with signals that are ignored or held back because this one did without them.
fn forget_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default is no function of ours; what cannot be set is not.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

/// The program called `name`, as `exec.LookPath` of runc's language looks for it, and with its words.
fn look_for(name: &str, path: &str) -> Result<PathBuf> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Unfit::Errno(errno)) => bail!("exec: {name:?}: stat {name}: {}", words(errno)),
            Err(Unfit::Directory) => bail!("exec: {name:?}: is a directory"),
            Err(Unfit::Forbidden) => bail!("exec: {name:?}: permission denied"),
        };
    }
    let found = path
        .split(':')
        // An empty part is the working directory, which is not where programs are looked for.
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| executable(candidate).is_ok());
    found.with_context(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

enum Unfit {
    Errno(Errno),
    Directory,
    Forbidden,
}

fn executable(path: &Path) -> std::result::Result<(), Unfit> {
    let meta = path.metadata().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Unfit::Errno(Errno::ENOENT),
        _ => Unfit::Errno(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
    })?;
    if meta.is_dir() {
        return Err(Unfit::Directory);
    }
    let may = nix::unistd::faccessat(
        nix::fcntl::AT_FDCWD,
        path,
        nix::unistd::AccessFlags::X_OK,
        nix::fcntl::AtFlags::AT_EACCESS,
    );
    match may {
        Ok(()) if meta.permissions().mode() & 0o111 != 0 => Ok(()),
        _ => Err(Unfit::Forbidden),
    }
}

/// An error in the words of runc's language, which are the C library's in small letters.
pub fn words(errno: Errno) -> String {
    // SAFETY: the C library's texts for known numbers are constants of this program's one thread.
    let text = unsafe { CStr::from_ptr(libc::strerror(errno as i32)) };
    let text = text.to_string_lossy();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn programs_are_told_in_runcs_words() {
        let directory = std::env::temp_dir().join(format!("look-{}", std::process::id()));
        fs::create_dir_all(directory.join("sub")).unwrap();
        for (name, mode) in [("run", 0o755), ("not", 0o644)] {
            fs::write(directory.join(name), "").unwrap();
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let at = |name: &str| directory.join(name).display().to_string();
        let path = format!("/nowhere::{}", directory.display());
        for (name, expected) in [
            ("run".to_owned(), Ok(at("run"))),
            (at("run"), Ok(at("run"))),
            ("not".to_owned(), Err("exec: \"not\": executable file not found in $PATH".to_owned())),
            ("gone".to_owned(), Err("exec: \"gone\": executable file not found in $PATH".to_owned())),
            (String::new(), Err("exec: \"\": executable file not found in $PATH".to_owned())),
            (at("not"), Err(format!("exec: {:?}: permission denied", at("not")))),
            (at("sub"), Err(format!("exec: {:?}: is a directory", at("sub")))),
            (
                at("gone"),
                Err(format!("exec: {:?}: stat {}: no such file or directory", at("gone"), at("gone"))),
            ),
        ] {
            let found = look_for(&name, &path);
            assert_eq!(
                found.map(|path| path.display().to_string()).map_err(|e| e.to_string()),
                expected,
                "{name}"
            );
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn errors_in_small_letters() {
        for (errno, text) in [
            (Errno::ENOENT, "no such file or directory"),
            (Errno::EACCES, "permission denied"),
            (Errno::ENOEXEC, "exec format error"),
        ] {
            assert_eq!(words(errno), text);
        }
    }
}

//! Debian packages for a foreign root: an apt of our own beside the machine's.
//!
//! It uses the machine's mirror and keys, but its own lists, state and architecture, so that it
//! neither needs nor changes what is installed here. The package database it starts from is empty:
//! what it downloads is the whole closure.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::children;
use crate::progress::Step;
use crate::spec::Arch;
use crate::tools::{self, capture, run};

/// The suite of the host, and the one whose containerd is taken beside it.
pub const SUITE: &str = "trixie";
pub const NEWER_SUITE: &str = "sid";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

pub struct Apt {
    dir: PathBuf,
    arch: Arch,
}

impl Apt {
    /// An apt with its state in `dir`, its lists fetched.
    pub fn open(dir: PathBuf, arch: Arch) -> Result<Self> {
        for sub in ["lists/partial", "archives/partial", "nowhere/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: apt-get install debian-archive-keyring (or run make setup)");
        }
        let mirror = mirror()?;
        let source =
            |suite| format!("deb [arch={} signed-by={KEYRING}] {mirror} {suite} main\n", arch.debian());
        let pin =
            |suite, priority| format!("Package: *\nPin: release n={suite}\nPin-Priority: {priority}\n\n");
        fs::write(dir.join("sources.list"), source(SUITE) + &source(NEWER_SUITE))?;
        fs::write(dir.join("preferences"), pin(SUITE, 900) + &pin(NEWER_SUITE, 100))?;
        fs::write(dir.join("status"), "")?;
        let apt = Self { dir, arch };
        let step = Step::begin(format!("fetching Debian's package lists for {}", arch.debian()));
        run(apt.command("apt-get").args(["-qq", "update"]))?;
        step.done("");
        Ok(apt)
    }

    /// Downloads `packages` and all they depend on; the paths of the packages.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.closure_of(SUITE, packages)
    }

    /// The same of the newer suite.
    pub fn newer_closure(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.closure_of(NEWER_SUITE, packages)
    }

    fn closure_of(&self, suite: &str, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let archives = self.dir.join("archives");
        // It lists only what is not downloaded yet: for the whole list it looks into an empty place.
        let mut nowhere = OsString::from("Dir::Cache::Archives=");
        nowhere.push(self.dir.join("nowhere"));
        let mut listing = self.command("apt-get");
        listing.arg("-o").arg(nowhere).args(["-qq", "-t", suite, "--print-uris", "install"]).args(packages);
        let list = capture(&mut listing)?;
        let wanted: Vec<(String, u64)> = list.lines().filter_map(parse_uri_line).collect();
        if wanted.is_empty() {
            bail!("apt resolves {} to nothing", packages.join(" "));
        }
        let total: u64 = wanted.iter().map(|(_, size)| size).sum();
        let step = Step::begin(format!(
            "downloading {} packages for {} ({} MiB)",
            wanted.len(),
            self.arch.debian(),
            total >> 20
        ));
        let mut download = self.command("apt-get");
        download.args(["-qq", "-y", "-t", suite, "--download-only", "install"]).args(packages);
        tools::run_watched(&mut download, || {
            let have: u64 = children(&archives)
                .into_iter()
                .chain(children(&archives.join("partial")))
                .flatten()
                .filter_map(|path| fs::metadata(path).ok())
                .filter(fs::Metadata::is_file)
                .map(|meta| meta.len())
                .sum();
            step.at(format_args!("{} of {} MiB", have.min(total) >> 20, total >> 20));
        })?;
        step.done("");
        let paths: Vec<PathBuf> = wanted.into_iter().map(|(name, _)| archives.join(name)).collect();
        if let Some(missing) = paths.iter().find(|path| !path.exists()) {
            bail!("apt did not download {}", missing.display());
        }
        Ok(paths)
    }

    /// Downloads single packages of the newer suite, without what they depend on.
    pub fn newer(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("newer");
        crate::cache::remove_tree(&dir)?;
        fs::create_dir(&dir)?;
        let step = Step::begin(format!("downloading {} of {NEWER_SUITE}", packages.join(" ")));
        let named: Vec<String> = packages.iter().map(|name| format!("{name}/{NEWER_SUITE}")).collect();
        run(self.command("apt-get").current_dir(&dir).args(["-qq", "download"]).args(named))?;
        step.done("");
        children(&dir)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = tools::command(program);
        let arch = self.arch.debian();
        for option in [
            format!("APT::Architecture={arch}"),
            format!("APT::Architectures={arch}"),
            "APT::Install-Recommends=false".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "APT::Keep-Downloaded-Packages=true".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        for (key, file) in [
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::Etc::Preferences", "preferences"),
            ("Dir::State", ""),
            ("Dir::State::Lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", ""),
            ("Dir::Cache::Archives", "archives"),
        ] {
            let mut option = OsString::from(format!("{key}="));
            option.push(self.dir.join(file));
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// The machine's own Debian mirror, or on other systems the one debootstrap knows.
fn mirror() -> Result<String> {
    let targets = capture(tools::command("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(ORIGIN) $(LABEL)",
    ]))
    .unwrap_or_default();
    if let Some(uri) = targets.lines().find_map(|line| line.strip_suffix(" Debian Debian")) {
        return Ok(uri.to_owned());
    }
    let script = "/usr/sbin/debootstrap";
    let text = fs::read_to_string(script).with_context(|| {
        format!("no Debian mirror: apt names none and {script} cannot be read (apt-get install debootstrap)")
    })?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("DEF_MIRROR="))
        .map(|value| value.trim_matches('"').to_owned())
        .with_context(|| format!("{script} names no default mirror"))
}

/// File name and size from a line of `apt-get --print-uris`: `'URI' NAME SIZE HASH`.
fn parse_uri_line(line: &str) -> Option<(String, u64)> {
    let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_lines() {
        for (line, expected) in [
            (
                "'http://m/p/b/bash_5.2%2b1_amd64.deb' bash_5.2+1_amd64.deb 1503 SHA256:00",
                Some(("bash_5.2+1_amd64.deb", 1503)),
            ),
            ("Reading package lists...", None),
            ("'http://m/x' x", None),
        ] {
            let parsed = parse_uri_line(line);
            assert_eq!(parsed.as_ref().map(|(name, size)| (name.as_str(), *size)), expected, "{line}");
        }
    }
}

//! The cgroup of a container on the host, which the monitor is in; and its place in the guest.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Result, invalid};
use crate::plan::Plan;
use crate::planner::Context;

/// Where containers go that do not say where.
const OURS: &str = "/supermachine";

/// A cgroup of the host, as config.json names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupPath {
    /// A directory below the root of the hierarchy; absolute.
    Fs(PathBuf),
    /// A scope of systemd's: `SLICE:PREFIX:NAME`.
    Systemd {
        /// The slice that it is in.
        slice: String,
        /// What its name begins with.
        prefix: String,
        /// The rest of its name.
        name: String,
    },
}

impl Default for CgroupPath {
    fn default() -> Self {
        CgroupPath::Fs(PathBuf::from("/"))
    }
}

impl CgroupPath {
    fn parse(text: &Path) -> std::result::Result<CgroupPath, &'static str> {
        let Some(name) = text.to_str() else { return Err("a cgroup has a name in UTF-8") };
        let parts: Vec<_> = name.split(':').collect();
        if let [slice, prefix, name] = parts[..]
            && !slice.starts_with('/')
        {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let plain = |part: &str| !part.contains('/') && part != "." && part != "..";
            return match slice.strip_suffix(".slice") {
                None => Err("of SLICE:PREFIX:NAME, the first ends in `.slice`"),
                Some(_) if ![slice, prefix, name].into_iter().all(plain) || name.is_empty() => {
                    Err("of SLICE:PREFIX:NAME, none is a path")
                }
                Some("-") => Ok(CgroupPath::systemd(slice, prefix, name)),
                Some(slices) if slices.split('-').any(str::is_empty) => {
                    Err("this is not the name of a slice")
                }
                Some(_) => Ok(CgroupPath::systemd(slice, prefix, name)),
            };
        }
        if text.components().any(|part| part == Component::ParentDir) {
            return Err("a cgroup does not lead upwards");
        }
        Ok(CgroupPath::Fs(Path::new(OURS).join(text)))
    }

    fn systemd(slice: &str, prefix: &str, name: &str) -> CgroupPath {
        CgroupPath::Systemd { slice: slice.to_owned(), prefix: prefix.to_owned(), name: name.to_owned() }
    }

    /// One that is named for the container is renamed with it: config.json of a container that is restored is that of
    /// the one that was saved, which may still be in its cgroup.
    fn renamed(self, from: &str, to: &str) -> CgroupPath {
        match self {
            CgroupPath::Fs(path) if path.file_name() == Some(from.as_ref()) => {
                CgroupPath::Fs(path.with_file_name(to))
            }
            CgroupPath::Systemd { slice, prefix, name } if name == from => {
                CgroupPath::Systemd { slice, prefix, name: to.to_owned() }
            }
            other => other,
        }
    }

    /// The unit, for systemd's.
    pub fn unit(&self) -> Option<String> {
        match self {
            CgroupPath::Fs(_) => None,
            CgroupPath::Systemd { name, .. } if name.strip_suffix(".slice").is_some() => Some(name.clone()),
            CgroupPath::Systemd { prefix, name, .. } if prefix.is_empty() => Some(format!("{name}.scope")),
            CgroupPath::Systemd { prefix, name, .. } => Some(format!("{prefix}-{name}.scope")),
        }
    }

    /// The directory, from the root of the hierarchy: systemd keeps `a-b.slice` in `a.slice`.
    pub fn directory(&self) -> PathBuf {
        let CgroupPath::Systemd { slice, .. } = self else {
            let CgroupPath::Fs(path) = self else { return PathBuf::from("/") };
            return path.clone();
        };
        let mut directory = PathBuf::from("/");
        let slices = slice.strip_suffix(".slice").unwrap_or(slice);
        let ends = slices.match_indices('-').map(|(end, _)| end).chain([slices.len()]);
        directory.extend(ends.map(|end| format!("{}.slice", &slices[..end])).filter(|_| slices != "-"));
        directory.extend(self.unit());
        directory
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CgroupPath::Fs(path) => path.display().fmt(f),
            CgroupPath::Systemd { slice, prefix, name } => write!(f, "{slice}:{prefix}:{name}"),
        }
    }
}

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let request = context.request;
    let asked = request.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    plan.cgroup.path = match asked.filter(|path| !path.as_os_str().is_empty()) {
        None => CgroupPath::Fs(Path::new(OURS).join(request.namespace).join(request.id)),
        Some(path) => CgroupPath::parse(&path)
            .map_err(|why| invalid("linux.cgroupsPath", format!("{:?}", path.display().to_string()), why))?
            .renamed(request.guest_id, request.id),
    };
    if let Some(linux) = plan.guest.spec.linux_mut() {
        linux.set_cgroups_path(Some(Path::new("/").join(request.guest_id)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    #[test]
    fn paths() {
        for (asked, directory, unit) in [
            ("", "/supermachine/default/c1", None),
            ("/default/c1", "/default/c1", None),
            ("mine/c1", "/supermachine/mine/c1", None),
            ("/kubepods/pod1:2:3/c1", "/kubepods/pod1:2:3/c1", None),
            ("system.slice:docker:ab", "/system.slice/docker-ab.scope", Some("docker-ab.scope")),
            (":docker:ab", "/system.slice/docker-ab.scope", Some("docker-ab.scope")),
            ("-.slice::ab", "/ab.scope", Some("ab.scope")),
            (
                "kubepods-besteffort-pod1_2.slice:cri-containerd:ab",
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-ab.scope",
                Some("cri-containerd-ab.scope"),
            ),
        ] {
            let plan = Case::with(&json!({ "linux": { "cgroupsPath": asked } })).plan();
            assert_eq!(plan.cgroup.path.directory(), Path::new(directory), "{asked}");
            assert_eq!(plan.cgroup.path.unit().as_deref(), unit, "{asked}");
            let guest = plan.guest.spec.linux().as_ref().unwrap().cgroups_path().clone();
            assert_eq!(guest, Some(PathBuf::from("/c1")));
        }
    }

    #[test]
    fn one_that_is_named_for_the_container_is_renamed_with_it() {
        for (asked, directory) in [
            ("", "/supermachine/default/c1"),
            ("/default/old", "/default/c1"),
            ("/old/pod", "/old/pod"),
            ("system.slice:docker:old", "/system.slice/docker-c1.scope"),
            ("system.slice:old:ab", "/system.slice/old-ab.scope"),
        ] {
            let mut case = Case::with(&json!({ "linux": { "cgroupsPath": asked } }));
            case.guest_id = Some("old".to_owned());
            assert_eq!(case.plan().cgroup.path.directory(), Path::new(directory), "{asked}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere() {
        for asked in
            ["/a/../../b", "..", "a:b:c", "a.slice:/x:c", "a.slice:b:../c", "a.slice:b:", "a--b.slice:c:d"]
        {
            let error = Case::with(&json!({ "linux": { "cgroupsPath": asked } })).error();
            assert_eq!(error.path(), "linux.cgroupsPath", "{asked}");
        }
    }
}

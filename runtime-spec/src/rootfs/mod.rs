//! The root file system of a container, from the mounts that containerd's snapshotter yields.
//!
//! Two ways lead to it, and a list of mounts goes one of them as a whole:
//!
//! - **In the guest**, when all of it is images (erofs, ext4) and what is made of them by reference
//!   (`{{ mount 0 }}`). The images are disks of the machine, and its kernel mounts them and the overlay.
//! - **On the host** otherwise: the shim mounts it to a place in the shared tree. So it is too where the machine has not
//!   as many drives, or others of its pod have disks in them.
//!
//! Without any mounts the root is the directory that the spec names, bound like on the second way.

mod template;

use std::path::{Path, PathBuf};

use crate::devices::next_serial;
use crate::error::{Error, Result, at, invalid, missing, unsupported};
use crate::host::Found;
use crate::plan::{Block, BlockSource, Directory, Mount, Plan, Source};
use crate::planner::Context;
use crate::{layout, mounts};

/// File systems whose images and disks the guest mounts.
pub(crate) const IMAGES: &[&str] = &["erofs", "ext4"];
/// What else the host mounts. Snapshotters yield these.
pub(crate) const HOST_TYPES: &[&str] = &["bind", "overlay", "btrfs", "zfs", "xfs"];
/// What containerd's mount manager would do to a mount, and we do: it hands them over raw if told so.
pub(crate) const TRANSFORMS: &[&str] = &["mkdir", "format"];

/// Options that are for the mount manager, of which this one is done here.
const CONTAINERD: &str = "X-containerd.";
const MKDIR: &str = "X-containerd.mkdir.";
/// Where another image of an erofs is.
const DEVICE: &str = "device=";

/// A mount of `CreateTaskRequest.rootfs`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// Its type, perhaps with transformations before it: `format/mkdir/overlay`.
    pub typ: String,
    /// What is mounted.
    pub source: String,
    /// Where, below the root. Mostly nothing.
    pub target: String,
    /// Flags and data.
    pub options: Vec<String>,
}

/// A mount, taken apart.
struct Part<'a> {
    place: String,
    typ: &'a str,
    given: &'a RootfsMount,
}

impl Part<'_> {
    fn is_image(&self) -> bool {
        IMAGES.contains(&self.typ)
    }

    /// As how many disks the guest would have it.
    fn disks(&self) -> usize {
        let more = self.given.options.iter().filter(|option| option.starts_with(DEVICE)).count();
        if self.is_image() { 1 + more } else { 0 }
    }

    /// Whether everything that it is made of is another mount of the list.
    fn refers_only(&self) -> bool {
        match self.typ {
            "overlay" => !self.given.options.iter().any(|option| names_host_path(option)),
            "bind" => template::is(&self.given.source),
            _ => false,
        }
    }

    fn refers(&self) -> bool {
        let strings = self.given.options.iter().chain([&self.given.source, &self.given.target]);
        strings.into_iter().any(|text| template::is(text))
    }
}

fn names_host_path(option: &str) -> bool {
    let value = option.split_once('=').map_or("", |(_, value)| value);
    template::split_outside(value).into_iter().any(|part| part.starts_with('/'))
}

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let request = context.request;
    let root = request.spec.root().as_ref();
    let id = request.guest_id;
    let guest_path = if request.rootfs.is_empty() {
        let named = root.map(|root| root.path().clone()).filter(|path| !path.as_os_str().is_empty());
        directory(context, plan, named)?;
        layout::in_guest(&layout::rootfs(id))
    } else {
        let mounts = request.rootfs.iter().enumerate();
        let parts = mounts.map(|(index, given)| part(index, given)).collect::<Result<Vec<_>>>()?;
        let in_guest = (1..=context.free_drives()).contains(&parts.iter().map(Part::disks).sum())
            && parts.iter().all(|part| part.is_image() || part.refers_only());
        if in_guest { of_images(context, plan, &parts)? } else { on_host(context, plan, &parts)? }
    };
    let mut root = root.cloned().unwrap_or_default();
    if request.spec.root().is_none() {
        root.set_readonly(Some(false));
    }
    root.set_path(guest_path);
    plan.guest.spec.set_root(Some(root));
    Ok(())
}

/// The directory that the spec names.
fn directory(context: &Context<'_>, plan: &mut Plan, named: Option<PathBuf>) -> Result<()> {
    let Some(named) = named else {
        return Err(invalid("root.path", "missing", "a container has a root file system"));
    };
    let source = context.absolute(&named);
    match context.request.host.files.look(&source) {
        Found::Directory => {}
        Found::Missing => return Err(missing("root.path", &source)),
        _ => return Err(invalid("root.path", source.display(), "this is not a directory")),
    }
    plan.share.rootfs.push(Mount {
        typ: "bind".to_owned(),
        source: Source::Path(source),
        target: context.shared(&layout::rootfs(context.request.guest_id)),
        options: vec!["rbind".to_owned()],
        devices: Vec::new(),
        mkdir: Vec::new(),
    });
    Ok(())
}

fn part(index: usize, given: &RootfsMount) -> Result<Part<'_>> {
    let place = at("rootfs", index);
    let asked = || format!("type {:?}", given.typ);
    let mut typ = given.typ.as_str();
    while let Some((transform, inner)) = typ.split_once('/') {
        if !TRANSFORMS.contains(&transform) {
            let why = format!("of transformations of mounts there are {}", TRANSFORMS.join(" and "));
            return Err(unsupported(place, asked(), why, "let containerd do it"));
        }
        typ = inner;
    }
    if !IMAGES.contains(&typ) && !HOST_TYPES.contains(&typ) {
        let why = format!("of types there are {} and {}", HOST_TYPES.join(", "), IMAGES.join(", "));
        return Err(unsupported(place, asked(), why, "use another snapshotter"));
    }
    Ok(Part { place, typ, given })
}

/// A root that the guest makes of disks.
fn of_images(context: &Context<'_>, plan: &mut Plan, parts: &[Part<'_>]) -> Result<PathBuf> {
    let id = context.request.guest_id;
    let places = places(parts, &layout::guest_rootfs(id), |index| layout::guest_layer(id, index));
    for (index, part) in parts.iter().enumerate() {
        let target = place_of(part, &places, index)?;
        let (options, mkdir) = options(part, &places[..index])?;
        let mount = if part.is_image() {
            let readonly = part.typ == "erofs" || options.iter().any(|option| option == "ro");
            let source = disk(context, plan, part, "source", Path::new(&part.given.source), readonly)?;
            let mut devices = Vec::new();
            let mut rest = Vec::new();
            for option in options {
                match option.strip_prefix(DEVICE) {
                    Some(path) => devices.push(disk(context, plan, part, "device", Path::new(path), true)?),
                    None if option == "loop" || (option == "rw" && readonly) => {}
                    None => rest.push(option),
                }
            }
            if readonly && !rest.iter().any(|option| option == "ro") {
                rest.push("ro".to_owned());
            }
            Mount { typ: part.typ.to_owned(), source, target, options: rest, devices, mkdir }
        } else {
            let source = Source::Path(source(part, &places[..index])?.into());
            Mount { typ: part.typ.to_owned(), source, target, options, devices: Vec::new(), mkdir }
        };
        plan.guest.mounts.push(mount);
    }
    Ok(layout::guest_rootfs(id))
}

fn disk(
    context: &Context<'_>,
    plan: &mut Plan,
    part: &Part<'_>,
    what: &str,
    path: &Path,
    readonly: bool,
) -> Result<Source> {
    let place = format!("{}.{what}", part.place);
    if !path.is_absolute() {
        return Err(invalid(place, format!("\"{}\"", path.display()), "the path of an image is absolute"));
    }
    match context.request.host.files.look(path) {
        Found::File | Found::Block { .. } => {}
        Found::Missing => return Err(missing(place, path)),
        _ => return Err(invalid(place, path.display(), "this is neither an image nor a disk")),
    }
    let serial = next_serial(context, plan);
    let source = BlockSource::Path(path.to_path_buf());
    plan.blocks.push(Block { serial: serial.clone(), source, readonly });
    Ok(Source::Disk(serial))
}

/// A root that the host mounts into the shared tree.
fn on_host(context: &Context<'_>, plan: &mut Plan, parts: &[Part<'_>]) -> Result<PathBuf> {
    let id = context.request.guest_id;
    let root = context.shared(&layout::rootfs(id));
    let places = places(parts, &root, |index| context.shared(&layout::layer(id, index)));
    for (index, part) in parts.iter().enumerate() {
        let target = place_of(part, &places, index)?;
        let (options, mkdir) = options(part, &places[..index])?;
        let source = source(part, &places[..index])?;
        if matches!(part.typ, "bind" | "erofs" | "ext4" | "xfs" | "btrfs")
            && !template::is(&part.given.source)
        {
            let place = format!("{}.source", part.place);
            let source = Path::new(&source);
            if !source.is_absolute() {
                return Err(invalid(place, format!("\"{}\"", source.display()), "a source is absolute"));
            }
            if context.request.host.files.look(source) == Found::Missing {
                return Err(missing(place, source));
            }
        }
        let source = Source::Path(source.into());
        plan.share.rootfs.push(Mount {
            typ: part.typ.to_owned(),
            source,
            target,
            options,
            devices: Vec::new(),
            mkdir,
        });
    }
    Ok(layout::in_guest(&layout::rootfs(id)))
}

/// Where each mount of a list goes. One that refers to others is made of them, so they are apart and the
/// last one is the root; otherwise they are mounted over each other, as `target` says.
fn places(parts: &[Part<'_>], root: &Path, layer: impl Fn(usize) -> PathBuf) -> Vec<PathBuf> {
    let composed = parts.iter().any(Part::refers);
    let last = parts.len() - 1;
    (0..parts.len())
        .map(|index| if composed && index != last { layer(index) } else { root.to_path_buf() })
        .collect()
}

fn place_of(part: &Part<'_>, places: &[PathBuf], index: usize) -> Result<PathBuf> {
    let target = part.given.target.trim_start_matches('/');
    if target.is_empty() {
        return Ok(places[index].clone());
    }
    let place = format!("{}.target", part.place);
    if template::is(target) {
        return Err(unsupported(place, target, "references are for sources and options", "use a plain path"));
    }
    if Path::new(target).components().any(|part| part.as_os_str() == "..") {
        return Err(invalid(place, target, "it leads out of the root"));
    }
    Ok(places[index].join(target))
}

/// The source with references resolved.
fn source(part: &Part<'_>, places: &[PathBuf]) -> Result<String> {
    template::expand(&part.given.source, places)
        .map_err(|why| invalid(format!("{}.source", part.place), &part.given.source, why))
}

/// Options with references resolved, and the directories that some of them ask to make.
fn options(part: &Part<'_>, places: &[PathBuf]) -> Result<(Vec<String>, Vec<Directory>)> {
    let mut options = Vec::new();
    let mut mkdir = Vec::new();
    for (index, option) in part.given.options.iter().enumerate() {
        let wrong = |why: String| invalid(at(&format!("{}.options", part.place), index), option, why);
        let text = template::expand(option, places).map_err(wrong)?;
        match text.strip_prefix(MKDIR) {
            None => options.push(text),
            Some(directory) => {
                mkdir.push(template::directory(directory).map_err(wrong)?);
            }
        }
    }
    check(part, &options)?;
    Ok((options, mkdir))
}

/// Refuses options that would be refused later without a name, or that nobody would heed.
fn check(part: &Part<'_>, options: &[String]) -> Result<()> {
    let known = |option: &String| {
        mounts::options::KNOWN.contains(&option.as_str())
            || mounts::filesystems::takes(part.typ, option)
            || option.starts_with(DEVICE)
    };
    let unknown = |option: &String| option.starts_with(CONTAINERD) || (part.is_image() && !known(option));
    if let Some(option) = options.iter().find(|option| unknown(option)) {
        let why = format!("it is no option of a mount of type {} that this runtime knows", part.typ);
        return Err(unsupported(format!("{}.options", part.place), option, why, "use another snapshotter"));
    }
    let mapped =
        options.iter().position(|option| option.starts_with("uidmap=") || option.starts_with("gidmap="));
    let Some(index) = mapped else { return Ok(()) };
    let path = at(&format!("{}.options", part.place), index);
    let instead = "let the snapshotter give the files their owners";
    Err::<(), Error>(unsupported(path, &options[index], "ids of mounts are not mapped", instead))
}

#[cfg(test)]
mod tests;

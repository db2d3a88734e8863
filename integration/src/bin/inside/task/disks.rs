//! Images and disks of the host as disks of the machine: mounted by the spec, made the root, or given as devices.
//!
//! runc has no machine to give them to, so beside ours it gets the same things the way its users do: mounted on the
//! host and bound.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use integration::command::{Running, contains};
use integration::containerd::{Api, Mount, shim_of};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::Signal;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::pod::{join, sandbox};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.disk-mounts",
            "images with ext4 and erofs that a spec mounts are read, written and protected as on the host, whatever \
             their names; what is written is in the image, and one image has one writer",
            mounts,
        ),
        test(
            "task.disk-rootfs",
            "a root of images as snapshotters hand them over is composed in the guest, and on the host where the guest \
             cannot have them",
            roots,
        ),
        test(
            "task.disk-loops",
            "where the host's kernel mounts no images from files, those of a container that joins a pod are on loop \
             devices, which go with it",
            loops,
        ),
        test(
            "task.disk-device",
            "a disk of the host that is given as a device is read and written as its rules say, unless it is in use",
            device,
        ),
    ]
}

const MIB: u64 = 1 << 20;

/// A mount of the host's, taken off with the value.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts `image` through a loop device.
    fn image(ctx: &Ctx<'_, Inside>, typ: &str, image: &Path, at: PathBuf, read_only: bool) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let options = if read_only { "loop,ro" } else { "loop" };
        ctx.cmd("mount").args(["-t", typ, "-o", options]).arg(image).arg(&at).ok()?;
        Ok(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(errno) = nix::mount::umount(&self.0) {
            eprintln!("# unmounting {}: {errno}", self.0.display());
        }
    }
}

/// A loop device of a file, taken off with the value.
struct Loop(PathBuf);

impl Loop {
    fn of(ctx: &Ctx<'_, Inside>, file: &Path) -> Result<Self> {
        let made = ctx.cmd("losetup").args(["--find", "--show"]).arg(file).ok()?;
        Ok(Self(made.out().trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("# {} could not be detached", self.0.display());
        }
    }
}

/// The host's module for loop devices, which stays.
fn with_loops(ctx: &Ctx<'_, Inside>) -> Result<()> {
    ctx.cmd("modprobe").arg("loop").ok().map(drop).map_err(Into::into)
}

/// An ext4 image with what is in `tree`.
pub fn ext4(ctx: &Ctx<'_, Inside>, image: &Path, tree: &Path) -> Result<()> {
    ctx.cmd("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree).arg(image).arg("24M").ok()?;
    Ok(())
}

/// A compressed erofs image with what is in `tree`.
pub fn erofs(ctx: &Ctx<'_, Inside>, image: &Path, tree: &Path) -> Result<()> {
    ctx.cmd("mkfs.erofs").args(["--quiet", "-zlz4hc"]).arg(image).arg(tree).ok()?;
    Ok(())
}

/// What a file of an ext4 image has in it, which nobody has mounted and which is whole.
fn in_ext4(ctx: &Ctx<'_, Inside>, image: &Path, file: &str) -> Result<String> {
    ctx.cmd("e2fsck").arg("-fn").arg(image).ok().context("the file system was damaged, or not unmounted")?;
    Ok(ctx.cmd("debugfs").args(["-R", &format!("cat {file}")]).arg(image).ok()?.out().into_owned())
}

pub fn push(spec: &mut Value, list: &str, item: Value) {
    if let Some(list) = spec.pointer_mut(list).and_then(Value::as_array_mut) {
        list.push(item);
    }
}

/// What a script prints that ends with 7.
fn said(mut task: Piped<'_>) -> Result<String> {
    task.container.start()?;
    let code = task.container.wait(A_WHILE)?;
    let out = task.stdout.read_to_end(A_WHILE)?;
    let errors = task.stderr.read_to_end(A_WHILE)?;
    task.end(code)?;
    let (out, errors) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&errors));
    ensure!(code == 7, "exit code {code}: {out}{errors}");
    Ok(out.into_owned())
}

/// Why a container of ours is not made.
fn refusal(ctx: &Ctx<'_, Inside>, api: &Api, edit: impl FnOnce(&mut Value)) -> Result<String> {
    match Piped::new(ctx, api, OURS, &["true"], edit) {
        Ok(_) => bail!("there is a container that should have been refused"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

const MOUNTS: &str = "cat /rw/greeting /ro/greeting /erofs/greeting; md5sum /erofs/large; \
    echo written > /rw/new; mkdir /rw/d; dd if=/dev/zero of=/rw/d/zeros bs=64k count=16 2>/dev/null; \
    for place in /ro /erofs; do touch $place/x; rm -f $place/greeting; done 2>&1; \
    cp /bin/busybox /rw/busybox; /rw/busybox true 2>&1; echo $?; \
    awk '$2 ~ /^\\/(rw|ro|erofs)$/ {print $2, $3, substr($4, 1, 2)}' /proc/mounts; echo done; read line; exit 7";

fn mounts(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_loops(ctx)?;
    let api = ctx.world.api()?;
    let tree = ctx.path("tree");
    fs::create_dir(&tree)?;
    fs::write(tree.join("greeting"), "from the image\n")?;
    fs::write(tree.join("large"), "a line that is there often\n".repeat(20_000))?;
    let theirs = mounted(ctx, &api, RUNC, &tree)?;
    let ours = mounted(ctx, &api, OURS, &tree)?;
    ensure!(ours == theirs, "ours says {ours}, with runc {theirs}");
    Ok(Outcome::Passed)
}

/// Runs the script with three images, and looks at what has become of them.
fn mounted(ctx: &Ctx<'_, Inside>, api: &Api, runtime: &str, tree: &Path) -> Result<String> {
    let directory = ctx.path(&format!("images {}", if runtime == OURS { "ours" } else { "runc" }));
    fs::create_dir(&directory)?;
    // Names that the monitor could take for its options.
    let [rw, ro, fixed] = ["rw, a b:ro", "ro:rw", "erofs:serial=x"].map(|name| directory.join(name));
    ext4(ctx, &rw, tree)?;
    ext4(ctx, &ro, tree)?;
    erofs(ctx, &fixed, tree)?;
    let before = [fs::read(&ro)?, fs::read(&fixed)?];
    let mut held = Vec::new();
    let mut wanted = Vec::new();
    for (place, typ, image, options) in [
        ("/rw", "ext4", &rw, vec!["noexec", "nosuid"]),
        ("/ro", "ext4", &ro, vec!["ro"]),
        ("/erofs", "erofs", &fixed, vec!["ro", "loop"]),
    ] {
        let mut mount = json!({ "destination": place, "type": typ, "source": image, "options": options });
        if runtime == RUNC {
            let read_only = options.contains(&"ro");
            let at = directory.join(format!("at{place}"));
            held.push(Mounted::image(ctx, typ, image, at.clone(), read_only)?);
            let options: Vec<_> =
                options.into_iter().filter(|option| *option != "loop").chain(["bind"]).collect();
            mount = json!({ "destination": place, "type": "bind", "source": at, "options": options });
        }
        wanted.push(mount);
    }
    let mut task = Piped::new(ctx, api, runtime, &["sh", "-c", MOUNTS], |spec| {
        for mount in &wanted {
            push(spec, "/mounts", mount.clone());
        }
    })?;
    task.container.start()?;
    let said = task.stdout.read_until("done\n", A_WHILE)?;
    if runtime == OURS {
        let again = refusal(ctx, api, |spec| push(spec, "/mounts", wanted[0].clone()))?;
        ensure!(again.contains("in use by another machine"), "a second writer: {again}");
    }
    task.stdin.write(b"\n")?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    drop(held);
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(code == 7, "{runtime}: exit code {code}: {said}");
    let written = in_ext4(ctx, &rw, "/new")?;
    ensure!(written == "written\n", "{runtime}: the image has {written:?}");
    let zeros = in_ext4(ctx, &rw, "/d/zeros")?;
    ensure!(zeros.len() as u64 == MIB, "{runtime}: the image has {} bytes of a MiB", zeros.len());
    ensure!([fs::read(&ro)?, fs::read(&fixed)?] == before, "{runtime}: a read-only image was changed");
    Ok(said)
}

/// Says which layer is on top, what is there, and what kind of file system it is.
const ROOT: &str = "cat /layer; ls /only | tr '\\n' ' '; echo mine > /written; cat /written; rm /bin/gone; \
    touch /bin/new; ls /bin/gone /bin/new 2>&1; awk '$2 == \"/\" {print $3}' /proc/mounts; exit 7";

/// Two layers and where a container writes, and how they are composed.
struct Layers {
    base: PathBuf,
    top: PathBuf,
    rw: PathBuf,
}

impl Layers {
    fn make(ctx: &Ctx<'_, Inside>, name: &str) -> Result<Self> {
        let directory = ctx.path(name);
        let tree = base_tree(&directory.join("base.tree"))?;
        let top = directory.join("top.tree");
        fs::create_dir_all(top.join("only/top"))?;
        fs::write(top.join("layer"), "top\n")?;
        let empty = directory.join("empty.tree");
        fs::create_dir(&empty)?;
        let made = Self {
            base: directory.join("base.erofs"),
            top: directory.join("top.erofs"),
            rw: directory.join("rw.ext4"),
        };
        erofs(ctx, &made.base, &tree)?;
        erofs(ctx, &made.top, &top)?;
        ext4(ctx, &made.rw, &empty)?;
        Ok(made)
    }

    /// As the erofs snapshotter of containerd 2.2 does with a writable image.
    fn with_writable_image(&self) -> Vec<Mount> {
        let options = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ];
        vec![
            mount("ext4", &self.rw, &["rw", "loop"]),
            mount("erofs", &self.top, &["ro", "loop"]),
            mount("erofs", &self.base, &["ro", "loop"]),
            mount("format/mkdir/overlay", Path::new("overlay"), &options),
        ]
    }

    /// As it does otherwise: what is written goes into a directory.
    fn with_directory(&self, upper: &Path, work: &Path) -> Vec<Mount> {
        let (upper, work) = (format!("upperdir={}", upper.display()), format!("workdir={}", work.display()));
        vec![
            mount("erofs", &self.top, &["ro", "loop"]),
            mount("erofs", &self.base, &["ro", "loop"]),
            mount("format/overlay", Path::new("overlay"), &[&work, &upper, "lowerdir={{ overlay 0 1 }}"]),
        ]
    }

    /// The same, composed by who gives it to runc.
    fn on_host(&self, ctx: &Ctx<'_, Inside>, upper: &Path, work: &Path) -> Result<(Vec<Mounted>, Mount)> {
        let mut held = Vec::new();
        for image in [&self.top, &self.base] {
            held.push(Mounted::image(ctx, "erofs", image, image.with_extension("at"), true)?);
        }
        let options = [
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}:{}", held[0].0.display(), held[1].0.display()),
        ];
        Ok((held, mount("overlay", Path::new("overlay"), &options.each_ref().map(String::as_str))))
    }
}

pub fn mount(typ: &str, source: &Path, options: &[&str]) -> Mount {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Mount { r#type: typ.to_owned(), source: source.display().to_string(), target: String::new(), options }
}

/// A busybox, and what tells where it is.
pub fn base_tree(at: &Path) -> Result<PathBuf> {
    for directory in ["bin", "dev", "only/base", "proc", "run", "sys"] {
        fs::create_dir_all(at.join(directory))?;
    }
    fs::copy("/usr/bin/busybox", at.join("bin/busybox"))?;
    for applet in ["awk", "cat", "ls", "rm", "sh", "sort", "touch", "tr"] {
        symlink("busybox", at.join("bin").join(applet))?;
    }
    fs::write(at.join("bin/gone"), "")?;
    fs::write(at.join("layer"), "base\n")?;
    Ok(at.to_owned())
}

/// Runs the script on a root, and returns the type of its file system with the rest of what it says.
fn on(ctx: &Ctx<'_, Inside>, api: &Api, runtime: &str, root: Vec<Mount>) -> Result<(String, String)> {
    let id = new_id(ctx, runtime);
    let task = Piped::on(ctx, api, runtime, id, &["sh", "-c", ROOT], Some(root), |_| {})?;
    split(&said(task)?)
}

fn split(said: &str) -> Result<(String, String)> {
    let (rest, typ) = said.trim_end().rsplit_once('\n').with_context(|| format!("it says {said:?}"))?;
    Ok((typ.to_owned(), rest.to_owned()))
}

fn roots(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_loops(ctx)?;
    let api = ctx.world.api()?;
    one_image(ctx, &api)?;
    in_the_guest(ctx, &api)?;
    on_a_directory(ctx, &api)?;
    in_a_pod(ctx, &api)?;
    Ok(Outcome::Passed)
}

/// As the blockfile snapshotter hands it over, to which runc's shim makes a loop device.
fn one_image(ctx: &Ctx<'_, Inside>, api: &Api) -> Result<()> {
    let tree = base_tree(&ctx.path("tree"))?;
    let mut all = Vec::new();
    for runtime in [RUNC, OURS] {
        let image = ctx.path(&format!("{}.ext4", new_id(ctx, runtime)));
        ext4(ctx, &image, &tree)?;
        let (typ, said) = on(ctx, api, runtime, vec![mount("ext4", &image, &["loop"])])?;
        ensure!(typ == "ext4", "{runtime}: the root is of type {typ}");
        let written = in_ext4(ctx, &image, "/written")?;
        ensure!(written == "mine\n", "{runtime}: the image has {written:?}");
        all.push(said);
    }
    same(&all)
}

fn same(said: &[String]) -> Result<()> {
    ensure!(said[1] == said[0], "ours says {:?}, with runc {:?}", said[1], said[0]);
    Ok(())
}

fn in_the_guest(ctx: &Ctx<'_, Inside>, api: &Api) -> Result<()> {
    let mut all = Vec::new();
    for (runtime, name) in [(RUNC, "guest-runc"), (OURS, "guest-ours")] {
        let layers = Layers::make(ctx, name)?;
        let (held, root) = if runtime == OURS {
            (Vec::new(), layers.with_writable_image())
        } else {
            let rw = Mounted::image(ctx, "ext4", &layers.rw, layers.rw.with_extension("at"), false)?;
            let (upper, work) = (rw.0.join("upper"), rw.0.join("work"));
            fs::create_dir(&upper)?;
            fs::create_dir(&work)?;
            let (mut held, root) = layers.on_host(ctx, &upper, &work)?;
            held.push(rw);
            (held, vec![root])
        };
        let (typ, said) = on(ctx, api, runtime, root)?;
        ensure!(typ == "overlay", "{runtime}: the root is of type {typ}");
        drop(held);
        let written = in_ext4(ctx, &layers.rw, "/upper/written")?;
        ensure!(written == "mine\n", "{runtime}: the image has {written:?}");
        all.push(said);
    }
    same(&all)
}

fn on_a_directory(ctx: &Ctx<'_, Inside>, api: &Api) -> Result<()> {
    let mut all = Vec::new();
    for (runtime, name, expected) in [(RUNC, "host-runc", "overlay"), (OURS, "host-ours", "virtiofs")] {
        let layers = Layers::make(ctx, name)?;
        let (upper, work) = (ctx.path(name).join("upper"), ctx.path(name).join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let (held, root) = if runtime == OURS {
            (Vec::new(), layers.with_directory(&upper, &work))
        } else {
            let (held, root) = layers.on_host(ctx, &upper, &work)?;
            (held, vec![root])
        };
        let (typ, said) = on(ctx, api, runtime, root)?;
        ensure!(typ == expected, "{runtime}: the root is of type {typ}");
        drop(held);
        let written = fs::read_to_string(upper.join("written"))?;
        ensure!(written == "mine\n", "{runtime}: the directory has {written:?}");
        all.push(said);
    }
    same(&all)
}

/// A machine that runs takes disks, too, and gives them back before it ends.
fn in_a_pod(ctx: &Ctx<'_, Inside>, api: &Api) -> Result<()> {
    let layers = Layers::make(ctx, "pod")?;
    let (first, _) = sandbox(ctx, api, OURS)?;
    let root = Some(layers.with_writable_image());
    let id = new_id(ctx, OURS);
    let task = Piped::on(ctx, api, OURS, id, &["sh", "-c", ROOT], root, |spec| join(spec, &first))?;
    let (typ, said) = split(&said(task)?)?;
    ensure!(typ == "overlay" && said.starts_with("top\n"), "the root is of type {typ}: {said}");
    let written = in_ext4(ctx, &layers.rw, "/upper/written")?;
    ensure!(written == "mine\n", "the image has {written:?}");
    // Nobody has it any more.
    File::open(&layers.rw)?.try_lock().context("the image is still in use")?;
    killed(first)
}

pub fn killed(task: Piped<'_>) -> Result<()> {
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}

/// What the shim is answered from now on when it mounts one of these, as by a kernel before 6.12.
fn without_files(ctx: &Ctx<'_, Inside>, shim: i32, images: &[&PathBuf], log: &Path) -> Result<Running> {
    let command = ctx.cmd("strace").args(["-f", "-e", "trace=mount", "-e", "inject=mount:error=ENOTBLK"]);
    let command = images.iter().fold(command, |command, image| command.arg("-P").arg(image));
    let tracing = command.arg("-o").arg(log).args(["-p", &shim.to_string()]).start()?;
    until("strace to be attached", A_WHILE, || {
        let said = tracing.stderr_so_far();
        if contains(&said, b"attached") {
            Attempt::Done(())
        } else {
            Attempt::Pending(String::from_utf8_lossy(&said).into_owned())
        }
    })?;
    Ok(tracing)
}

/// The files behind the host's loop devices.
fn behind_loops() -> Result<Vec<PathBuf>> {
    let devices = fs::read_dir("/sys/block").context("reading /sys/block")?.flatten();
    let files = devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    Ok(files.map(|file| file.trim_end().into()).collect())
}

fn loops(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_loops(ctx)?;
    let api = ctx.world.api()?;
    let layers = Layers::make(ctx, "loops")?;
    let (upper, work) = (ctx.path("loops/upper"), ctx.path("loops/work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let (first, _) = sandbox(ctx, &api, OURS)?;
    let images = [&layers.top, &layers.base];
    let log = ctx.path("strace");
    let tracing = without_files(ctx, shim_of(&first.id)?.pid, &images, &log)?;
    let root = Some(layers.with_directory(&upper, &work));
    let id = new_id(ctx, OURS);
    let task = Piped::on(ctx, &api, OURS, id, &["sh", "-c", ROOT], root, |spec| join(spec, &first))?;
    let behind = behind_loops()?;
    tracing.signal(Signal::SIGINT)?;
    tracing.wait()?;
    let (typ, said) = split(&said(task)?)?;
    ensure!(typ == "virtiofs" && said.starts_with("top\n"), "the root is of type {typ}: {said}");
    killed(first)?;
    let refused = fs::read_to_string(&log)?.matches("ENOTBLK").count();
    ensure!(refused == images.len(), "{refused} mounts were refused");
    ensure!(images.iter().all(|image| behind.contains(image)), "loop devices are on {behind:?}");
    let written = fs::read_to_string(upper.join("written"))?;
    ensure!(written == "mine\n", "the directory has {written:?}");
    Ok(Outcome::Passed)
}

const DEVICE: &str = "head -c 5 /dev/xvda; echo; \
    echo back | dd of=/dev/xvda bs=4k seek=1 conv=notrunc,fsync 2>/dev/null; echo $?; \
    ls -l /dev/xvda | cut -c 1-10; exit 7";

fn device(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    with_loops(ctx)?;
    let api = ctx.world.api()?;
    let backing = ctx.path("disk");
    for (access, written) in [("rw", true), ("r", false)] {
        let mut all = Vec::new();
        for runtime in [RUNC, OURS] {
            let file = File::create(&backing)?;
            file.set_len(MIB)?;
            file.write_all_at(b"hello", 0)?;
            let disk = Loop::of(ctx, &backing)?;
            let task =
                Piped::new(ctx, &api, runtime, &["sh", "-c", DEVICE], |spec| give(spec, &disk.0, access))?;
            all.push(said(task)?);
            drop(disk);
            let found = &fs::read(&backing)?[4096..4100];
            ensure!((found == b"back") == written, "{runtime}, {access}: the disk has {found:?}");
        }
        same(&all).with_context(|| format!("with access {access}"))?;
    }
    // The host's own file system is not written by two.
    let tree = ctx.path("tree");
    fs::create_dir(&tree)?;
    let image = ctx.path("image");
    ext4(ctx, &image, &tree)?;
    let at = Mounted::image(ctx, "ext4", &image, ctx.path("at"), false)?;
    let table = fs::read_to_string("/proc/self/mounts")?;
    let place = at.0.display().to_string();
    let row =
        table.lines().find(|line| line.split(' ').nth(1) == Some(&place)).context("it is not mounted")?;
    let node = PathBuf::from(row.split(' ').next().unwrap_or_default());
    let text = refusal(ctx, &api, |spec| give(spec, &node, "rw"))?;
    ensure!(text.contains("mounted on the host"), "a disk that is mounted: {text}");
    Ok(Outcome::Passed)
}

/// The disk at `node` as `/dev/xvda`, and no other.
fn give(spec: &mut Value, node: &Path, access: &str) {
    let found = fs::metadata(node).ok().filter(|found| found.file_type().is_block_device());
    let number = found.map_or(0, |found| found.rdev());
    let (major, minor) = (major(number), minor(number));
    spec["linux"]["devices"] = json!([{
        "path": "/dev/xvda", "type": "b", "major": major, "minor": minor, "fileMode": 0o660, "uid": 0, "gid": 0,
    }]);
    spec["linux"]["resources"]["devices"] = json!([
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "b", "major": major, "minor": minor, "access": access },
    ]);
}

//! What the monitor says when it is asked for what cannot be.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::command::Finished;
use integration::{Ctx, Outcome, Rounds, Test};

use crate::world::Inside;

/// A case has this long to be refused.
const AT_ONCE: Duration = Duration::from_secs(20);

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.bad-input",
        proves: "whatever is wrong with its options or its host, the monitor says so in one line that names what \
                 and what to do, fails, and leaves nothing",
        run,
        deadline: Duration::from_mins(3),
        rounds: Rounds::once_or(3),
        tags: &[],
    }]
}

/// One thing that is wrong.
struct Case {
    what: &'static str,
    /// The program that runs the monitor in such surroundings, for what is wrong with those.
    through: Vec<String>,
    options: Vec<String>,
    /// All of these are in the line.
    words: Vec<&'static str>,
}

/// Files that are no use to a monitor, or are.
struct Files {
    directory: PathBuf,
    kernel: PathBuf,
}

impl Files {
    fn make(guest: &Path, kernel: PathBuf, directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory)?;
        let files = Self { directory, kernel };
        let kernel =
            fs::read(&files.kernel).with_context(|| format!("reading {}", files.kernel.display()))?;
        fs::write(files.path("text"), "This is no kernel.\n".repeat(100))?;
        fs::write(files.path("empty"), "")?;
        fs::write(files.path("cut"), &kernel[..kernel.len() / 2])?;
        fs::write(files.path("header"), &kernel[..40])?;
        let mut foreign = kernel[..kernel.len().min(1 << 20)].to_vec();
        make_foreign(&mut foreign);
        fs::write(files.path("foreign"), foreign)?;
        File::create(files.path("large"))?.set_len(1 << 30)?;
        File::create(files.path("disk"))?.set_len(1 << 20)?;
        File::create(files.path("spare-disk"))?.set_len(1 << 20)?;
        File::create(files.path("odd-disk"))?.set_len(1000)?;
        fs::set_permissions(files.path("disk"), std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
        ensure!(guest.is_dir(), "{} is not there", guest.display());
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

/// Makes a kernel of this architecture one of another: by the machine of its ELF header, or the magic number
/// of an Image with the header of an ELF file.
fn make_foreign(kernel: &mut [u8]) {
    const EM_PPC64: u8 = 21;
    if kernel.starts_with(b"\x7fELF") {
        kernel[18] = EM_PPC64;
    } else {
        kernel[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    }
}

fn cases(files: &Files) -> Vec<Case> {
    let kernel = files.kernel.display().to_string();
    let with = |what, options: &[&str], words: &[&'static str]| {
        let mut all = vec!["--kernel".to_owned(), kernel.clone()];
        all.extend(options.iter().map(|&option| option.to_owned()));
        Case { what, through: Vec::new(), options: all, words: words.to_vec() }
    };
    let of_kernel = |what, name: &str, words: &[&'static str]| Case {
        what,
        through: Vec::new(),
        options: vec!["--kernel".to_owned(), files.text(name)],
        words: words.to_vec(),
    };
    let through = |through: &[&str], mut case: Case| {
        case.through = through.iter().map(|&word| word.to_owned()).collect();
        case
    };
    let in_own_dev = |script: &'static str| vec!["unshare", "--mount", "sh", "-c", script, "sh"];
    let many: Vec<String> =
        (0..300).flat_map(|_| ["--block".to_owned(), files.text("spare-disk") + ":ro"]).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    vec![
        through(&in_own_dev("mount -t tmpfs none /dev && exec \"$@\""), with("no KVM", &[], &["/dev/kvm"])),
        through(
            &in_own_dev("mount --bind /dev/null /dev/kvm && exec \"$@\""),
            with("a KVM that is none", &[], &["/dev/kvm"]),
        ),
        through(
            &["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
            with("no permission for KVM", &[], &["/dev/kvm", "ermission"]),
        ),
        of_kernel("no such kernel", "absent", &["absent", "No such file", "give one"]),
        of_kernel("a kernel that is text", "text", &["text", "this machine boots"]),
        of_kernel("a kernel that is empty", "empty", &["empty", "this machine boots"]),
        of_kernel("a kernel that is cut", "cut", &["cut", "fetch it again"]),
        of_kernel("a kernel that is a part of its header", "header", &["header"]),
        of_kernel("a kernel of another architecture", "foreign", &["foreign", "this machine boots"]),
        of_kernel("a kernel that is a directory", "", &["regular file", "give another"]),
        with("an initrd that is not there", &["--initrd", &files.text("absent")], &["absent", "give one"]),
        with("an initrd larger than RAM", &["--initrd", &files.text("large")], &["large", "more memory"]),
        with("no RAM", &["--memory", "0"], &["memory", "32 MiB"]),
        with("RAM of no size", &["--memory", "lots"], &["lots"]),
        with("more RAM than there can be", &["--memory", "16777216G"], &["memory", "512 GiB"]),
        with("no processors", &["--cpus", "0"], &["0 processors"]),
        with("1000 processors", &["--cpus", "1000"], &["1000 processors", "1 to"]),
        with(
            "a share that is not there",
            &["--share", &format!("x={}", files.text("absent"))],
            &["absent", "give one"],
        ),
        with(
            "a share that is a file",
            &["--share", &format!("x={}", files.text("text"))],
            &["text", "give a directory"],
        ),
        with("a share without a tag", &["--share", &files.text("")], &["TAG=DIR"]),
        with("a disk that is not there", &["--block", &files.text("absent")], &["absent", "give one"]),
        with(
            "a disk of half a sector",
            &["--block", &files.text("odd-disk")],
            &["odd-disk", "512", "truncate"],
        ),
        with("a disk that is a directory", &["--block", &files.text("")], &["irectory", "give a file"]),
        through(
            &["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"],
            with(
                "a read-only disk to be written",
                &["--block", &files.text("disk")],
                &["disk", "ermission", ":ro"],
            ),
        ),
        with("a tap that is gone", &["--tap", "gone0"], &["gone0", "ip tuntap add"]),
        with("too many devices", &many, &["devices"]),
        with("no console", &["--console", "/nowhere"], &["/nowhere", "give"]),
        with(
            "a console nobody listens at",
            &["--console", &format!("unix:{}", files.text("absent"))],
            &["absent"],
        ),
        with(
            "a console in no directory",
            &["--console", &format!("file:{}/x", files.text("absent"))],
            &["absent"],
        ),
        with("a vsock in no directory", &["--vsock", &files.text("absent")], &["absent", "give a directory"]),
        with("a command line without end", &["--append", &"x".repeat(70_000)], &["command line"]),
        with("an option that does not exist", &["--frobnicate"], &["--frobnicate", "--help"]),
        Case { what: "no kernel", through: vec![], options: vec![], words: vec!["--kernel"] },
    ]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let kernel = ctx.world.guest.join(if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" });
    let files = Files::make(&ctx.world.guest, kernel, ctx.path("files"))?;
    let program = which(&ctx.world.vmm)?;
    let listed = || -> Result<BTreeSet<PathBuf>> {
        let entries = fs::read_dir(&files.directory).context("listing the files of the test")?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    };
    let before = listed()?;
    let mut wrong = Vec::new();
    for case in cases(&files) {
        let mut words = case.through.clone();
        words.push(program.display().to_string());
        words.push("run".into());
        words.extend(case.options.clone());
        let done = ctx.cmd(&words[0]).deadline(AT_ONCE).args(&words[1..]).run();
        let complaint = match done {
            Ok(done) => complaint(&case, &done),
            Err(error) => Some(error.to_string()),
        };
        if let Some(complaint) = complaint {
            wrong.push(format!("{}: {complaint}", case.what));
        }
        let after = listed()?;
        ensure!(after == before, "{}: it left files: {after:?}", case.what);
    }
    if wrong.is_empty() { Ok(Outcome::Passed) } else { Ok(Outcome::Failed(wrong.join("\n"))) }
}

/// What is wrong with how a case ended.
fn complaint(case: &Case, done: &Finished) -> Option<String> {
    let said = done.err();
    if !matches!(done.code(), Some(1 | 2)) {
        return Some(format!("it ended with {}: {said}", done.status));
    }
    if said.lines().count() != 1 || !said.starts_with("supermachine-vmm: ") {
        return Some(format!("it did not say one line, but {said:?}"));
    }
    if said.len() > 1000 {
        return Some(format!("its line has {} bytes", said.len()));
    }
    if !done.stdout.is_empty() {
        return Some(format!("it said something on stdout: {:?}", done.out()));
    }
    let missing: Vec<_> = case.words.iter().filter(|word| !said.contains(**word)).collect();
    (!missing.is_empty()).then(|| format!("its line does not have {missing:?}: {said}"))
}

/// Where `program` is: through some of the above it would be looked for elsewhere.
fn which(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("{} is in no directory of PATH", program.display()))
}

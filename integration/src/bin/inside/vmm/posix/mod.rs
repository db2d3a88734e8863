//! A share beside the host's own file system: the same calls are made on both, and what comes of them compared.

mod known;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::{Ctx, Outcome, Rounds, Test};

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;
use known::{DIFFERENCES, Difference};

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.posix",
        proves: "file system calls do on a share what they do on the host, but for the differences that are known, \
             what they leave looks the same from both sides, and on a read-only share each is refused",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(3),
        tags: &[],
    }]
}

/// On a file system with a disk: what is mounted at `/tmp` may be one without.
const PLACE: &str = "/var/tmp";

/// A directory that goes with all that is in it.
struct Area(PathBuf);

impl Area {
    fn new() -> Result<Self> {
        let path = Path::new(PLACE).join(format!("posix-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        // Users other than root take part.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What else a guest may remember of a share, and of which cases that is tried: those in which two look at one file.
const POLICIES: [(&str, &str); 2] = [("never", ""), ("always", "")];

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let area = Area::new()?;
    let (ours, shared, fixed) =
        (area.directory("ours")?, area.directory("shared")?, area.directory("fixed")?);
    on_host(ctx, "make-for-reading", &fixed)?;
    let before = on_host(ctx, "tree", &fixed)?;
    let mut machine = boot(ctx, "g").share("shared", &shared, false).share("fixed", &fixed, true);
    for (policy, _) in POLICIES {
        let directory = area.directory(policy)?;
        machine = machine.options(["--share", &format!("{policy}={}:cache={policy}", directory.display())]);
    }
    let guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    guest.sh(
        "for tag in shared fixed never always; do mkdir /$tag; mount -t virtiofs $tag /$tag; done",
        A_MOMENT,
    )?;
    let within = ctx.left().mul_f64(0.8);

    let host = on_host(ctx, "table", &ours)?;
    let share = in_guest(ctx, &guest, &["table", "/shared"], within)?;
    let mut complaints = compared(&host, &share, "");

    let theirs = in_guest(ctx, &guest, &["tree", "/shared"], within)?;
    complaints.extend(unlike("in the tree that is left", &on_host(ctx, "tree", &shared)?, &theirs));

    for (policy, family) in POLICIES {
        let share = in_guest(ctx, &guest, &["table", &format!("/{policy}"), family], within)?;
        let of_policy = compared(&host, &share, family);
        complaints.extend(of_policy.into_iter().map(|complaint| format!("with cache={policy}: {complaint}")));
    }

    complaints.extend(not_refused(&in_guest(ctx, &guest, &["read-only", "/fixed"], within)?, &UNASKED));
    guest.sh("mount -o remount,ro /fixed", A_MOMENT)?;
    complaints.extend(not_refused(&in_guest(ctx, &guest, &["read-only", "/fixed"], within)?, &[]));
    complaints.extend(unlike("on the read-only share", &before, &on_host(ctx, "tree", &fixed)?));

    for complaint in &complaints {
        ctx.note(complaint);
    }
    guest.sh("for tag in shared fixed never always; do umount /$tag; done", A_MOMENT)?;
    guest.ends_well()?;
    ensure!(complaints.is_empty(), "{} lines are wrong, first {}", complaints.len(), complaints[0]);
    Ok(Outcome::Passed)
}

/// Lines by what stands before their colon: a case or a path, and what is told of it.
type Told = BTreeMap<String, String>;

fn lines(text: &str) -> Told {
    let split = |line: &str| line.split_once(": ").map(|(name, told)| (name.to_owned(), told.to_owned()));
    text.lines().filter_map(split).collect()
}

fn on_host(ctx: &Ctx<'_, Inside>, verb: &str, directory: &Path) -> Result<Told> {
    let done = ctx.cmd(&ctx.world.guest_part).args(["posix", verb]).arg(directory).ok()?;
    Ok(lines(&done.out()))
}

fn in_guest(ctx: &Ctx<'_, Inside>, guest: &Guest, words: &[&str], within: Duration) -> Result<Told> {
    let begun = Instant::now();
    let ran = guest.run([&["guest-part", "posix"], words].concat(), within)?;
    ensure!(ran.code == 0, "in the guest: {ran}");
    let told = lines(&ran.out());
    ctx.note(format!("{words:?}: {} lines in {:.2} s", told.len(), begun.elapsed().as_secs_f64()));
    Ok(told)
}

/// Complaints about cases of a family: differences nobody knows of, and known ones that are none any more.
fn compared(host: &Told, share: &Told, family: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let of_family = |name: &&String| name.starts_with(family);
    let names: BTreeSet<&String> = host.keys().filter(of_family).chain(share.keys()).collect();
    let told = |all: &Told, name: &str| all.get(name).map_or("nothing", String::as_str).to_owned();
    for name in &names {
        let (host, share) = (told(host, name), told(share, name));
        match DIFFERENCES.iter().find(|difference| difference.case == *name) {
            None if host == share => {}
            None => complaints.push(format!("{name}: the host {host}, the share {share}")),
            Some(Difference { host: h, share: s, .. }) if (*h, *s) == (&host, &share) => {}
            Some(Difference { host: h, share: s, why, .. }) => complaints.push(format!(
                "{name}: the host {host}, the share {share}; known was the host {h}, the share {s} ({why})"
            )),
        }
    }
    let known = DIFFERENCES.iter().filter(|difference| difference.case.starts_with(family));
    let unheard = known.filter(|difference| !host.contains_key(difference.case));
    complaints.extend(unheard.map(|difference| format!("{}: there is no such case", difference.case)));
    complaints
}

/// Complaints about what two listings do not have in common.
fn unlike(what: &str, one: &Told, other: &Told) -> Vec<String> {
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    names
        .into_iter()
        .filter(|name| one.get(*name) != other.get(*name))
        .map(|name| {
            let told = |all: &Told| all.get(name).map_or("nothing", String::as_str).to_owned();
            format!("{what}: {name}: the host {}, the other {}", told(one), told(other))
        })
        .collect()
}

/// What a guest that mounts the share for writing is not told before it tries: the question is not passed on for
/// what is no file, so the answer cannot be no for all.
const UNASKED: [&str; 2] = ["refused.access", "refused.access-directory"];

/// Complaints about calls that were not refused with EROFS, but for the `allowed`, and those of the others that were.
fn not_refused(told: &Told, allowed: &[&str]) -> Vec<String> {
    let is_wrong = |name: &str, outcome: &str| {
        if name.starts_with("refused.") && !allowed.contains(&name) {
            outcome != "EROFS"
        } else {
            outcome.split(' ').any(|word| word.starts_with('E'))
        }
    };
    let wrong = told.iter().filter(|(name, outcome)| is_wrong(name, outcome));
    wrong.map(|(name, outcome)| format!("on the read-only share: {name}: {outcome}")).collect()
}

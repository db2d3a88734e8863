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

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let area = Area::new()?;
    let (ours, shared, fixed) =
        (area.directory("ours")?, area.directory("shared")?, area.directory("fixed")?);
    on_host(ctx, "make-for-reading", &fixed)?;
    let before = on_host(ctx, "tree", &fixed)?;
    let machine = boot(ctx, "g").share("shared", &shared, false).share("fixed", &fixed, true);
    let guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    guest.sh("mkdir /a /b; mount -t virtiofs shared /a; mount -t virtiofs fixed /b", A_MOMENT)?;
    let within = ctx.left().mul_f64(0.8);

    let host = on_host(ctx, "table", &ours)?;
    let share = in_guest(ctx, &guest, "table", "/a", within)?;
    let mut complaints = compared(ctx, &host, &share, DIFFERENCES);

    let theirs = in_guest(ctx, &guest, "tree", "/a", within)?;
    complaints.extend(unlike("in the tree that is left", &on_host(ctx, "tree", &shared)?, &theirs));

    complaints.extend(not_refused(&in_guest(ctx, &guest, "read-only", "/b", within)?));
    complaints.extend(unlike("on the read-only share", &before, &on_host(ctx, "tree", &fixed)?));
    for complaint in &complaints {
        ctx.note(complaint);
    }
    guest.sh("umount /a; umount /b", A_MOMENT)?;
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

fn in_guest(
    ctx: &Ctx<'_, Inside>,
    guest: &Guest,
    verb: &str,
    directory: &str,
    within: Duration,
) -> Result<Told> {
    let begun = Instant::now();
    let ran = guest.run(["guest-part", "posix", verb, directory], within)?;
    ensure!(ran.code == 0, "in the guest: {ran}");
    let told = lines(&ran.out());
    ctx.note(format!("{verb}: {} lines in {:.2} s", told.len(), begun.elapsed().as_secs_f64()));
    Ok(told)
}

/// Complaints about differences nobody knows of, and about known ones that are none any more.
fn compared(ctx: &Ctx<'_, Inside>, host: &Told, share: &Told, known: &[Difference]) -> Vec<String> {
    const NONE: &str = "(nothing)";
    let mut complaints = Vec::new();
    let told = |all: &Told, name: &str| all.get(name).map_or(NONE, String::as_str).to_owned();
    let names: BTreeSet<&String> = host.keys().chain(share.keys()).collect();
    ctx.note(format!("{} cases, {} known differences", names.len(), known.len()));
    for name in names {
        let (host, share) = (told(host, name), told(share, name));
        let expected = known.iter().find(|difference| difference.case == name);
        match expected {
            None if host == share => {}
            None => complaints.push(format!("{name}: the host {host}, the share {share}")),
            Some(Difference { host: h, share: s, .. }) if (*h, *s) == (&host, &share) => {}
            Some(Difference { host: h, share: s, why, .. }) => complaints.push(format!(
                "{name}: the host {host}, the share {share}; known was the host {h}, the share {s} ({why})"
            )),
        }
    }
    let unheard = known.iter().filter(|difference| !host.contains_key(difference.case));
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

/// Complaints about calls that were not refused with EROFS, and those of the others that were.
fn not_refused(told: &Told) -> Vec<String> {
    let expected = |name: &str| name.starts_with("refused.");
    let wrong = |outcome: &str, refused: bool| {
        if refused { outcome != "EROFS" } else { outcome.split(' ').any(|word| word.starts_with('E')) }
    };
    told.iter()
        .filter(|(name, outcome)| wrong(outcome, expected(name)))
        .map(|(name, outcome)| format!("on the read-only share: {name}: {outcome}"))
        .collect()
}

//! Clients that people have, asked the same with runc and with ours.
//!
//! What a client can do is a table of features: each is a script, which is run with either runtime, and has to say the
//! same. The table of `docs/clients.md` is what comes of it.

mod docker;

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    docker::tests()
}

/// The page that has the tables.
const PAGE: &str = include_str!("../../../../../docs/clients.md");
/// For what a script does with one runtime.
const A_WHILE: Duration = Duration::from_mins(4);
/// What scripts have at hand.
const WORDS: &str = include_str!("words.sh");

/// Something that a client can do.
struct Feature {
    /// As it stands in the table.
    name: &'static str,
    /// Does it with `$RUNTIME`, where the client's default is called `$DEFAULT`, in an empty directory. Ends with 0 if it could; what it says is compared.
    script: &'static str,
    /// Whether it is tried for every change, or in a soak only.
    often: bool,
    /// How it differs from what it is with runc, as it stands in the table.
    differs: Option<&'static str>,
}

const fn often(name: &'static str, script: &'static str) -> Feature {
    Feature { name, script, often: true, differs: None }
}

const fn seldom(name: &'static str, script: &'static str) -> Feature {
    Feature { name, script, often: false, differs: None }
}

const fn other(name: &'static str, differs: &'static str, script: &'static str) -> Feature {
    Feature { name, script, often: false, differs: Some(differs) }
}

impl Feature {
    /// As a row of the table.
    fn row(&self) -> String {
        format!("| `{}` | {} |", self.name, self.differs.unwrap_or("as with runc"))
    }

    /// What the script says with `runtime`, and whether it could do it. The client's default is called `default`.
    fn said(&self, ctx: &Ctx<'_, Inside>, runtime: &str, default: &str) -> Result<(bool, String)> {
        let directory = ctx.path("feature");
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        ctx.note(format_args!("{}, with {runtime}", self.name));
        let script = ctx.path("script");
        std::fs::write(&script, format!("set -eu\n{WORDS}\n{}\n", self.script))
            .context("writing the script")?;
        let done = ctx
            .cmd("sh")
            .arg(&script)
            .env("RUNTIME", runtime)
            .env("DEFAULT", default)
            .env("GUEST_PART", &ctx.world.guest_part)
            .current_dir(directory)
            .deadline(A_WHILE)
            .run()?;
        Ok((done.code() == Some(0), format!("{}{}", done.out(), done.err())))
    }
}

/// What was said of each feature that is to be tried, by runtime.
type Said = Vec<(bool, String)>;

/// Those of `features` that are to be tried now.
fn chosen<'a>(ctx: &Ctx<'_, Inside>, features: &'a [Feature]) -> Vec<&'a Feature> {
    let all = ctx.either(false, true);
    features.iter().filter(|feature| all || feature.often).collect()
}

/// Compares what was said with runc and with ours, and with the page.
fn compare(features: &[&Feature], runc: &Said, ours: &Said) -> Result<()> {
    let mut wrong = String::new();
    for ((feature, (runc_could, by_runc)), (we_could, by_ours)) in features.iter().zip(runc).zip(ours) {
        let name = feature.name;
        let same = runc_could == we_could && by_runc == by_ours;
        if !runc_could {
            let _ = writeln!(wrong, "{name}: not even runc: {by_runc}");
        } else if same == feature.differs.is_some() {
            let is = if same { "as with runc" } else { "other than with runc" };
            let _ = writeln!(wrong, "{name}: {is}: runc: {by_runc:?}, ours ({we_could}): {by_ours:?}");
        }
        if !PAGE.contains(&feature.row()) {
            let _ = writeln!(wrong, "docs/clients.md does not have the row {}", feature.row());
        }
    }
    ensure!(wrong.is_empty(), "{wrong}");
    Ok(())
}

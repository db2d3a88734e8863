//! Clients that people have, asked the same with runc and with ours.
//!
//! What a client can do is a table of features: each is something that is done with either runtime, and has to say the
//! same. The tables of `docs/clients.md` are what comes of it.

mod docker;
mod kubernetes;

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use integration::{Ctx, Test};

use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    [docker::tests(), kubernetes::tests()].into_iter().flatten().collect()
}

/// The page that has the tables.
const PAGE: &str = include_str!("../../../../../docs/clients.md");
/// For what is done with one runtime.
const A_WHILE: Duration = Duration::from_mins(4);
/// Something that a client can do.
struct Feature<D> {
    /// As it stands in the table.
    name: &'static str,
    /// How it is done. What it says is compared.
    does: D,
    /// Whether it is tried for every change, or in a soak only.
    often: bool,
    /// How it differs from what it is with runc, as it stands in the table.
    differs: Option<&'static str>,
}

const fn often<D>(name: &'static str, does: D) -> Feature<D> {
    Feature { name, does, often: true, differs: None }
}

const fn seldom<D>(name: &'static str, does: D) -> Feature<D> {
    Feature { name, does, often: false, differs: None }
}

const fn other<D>(name: &'static str, differs: &'static str, does: D) -> Feature<D> {
    Feature { name, does, often: false, differs: Some(differs) }
}

impl<D> Feature<D> {
    /// As a row of the table.
    fn row(&self) -> String {
        format!("| `{}` | {} |", self.name, self.differs.unwrap_or("as with runc"))
    }
}

/// What was said of each feature that is to be tried, by runtime.
type Said = Vec<(bool, String)>;

/// Those of `features` that are to be tried now.
fn chosen<'a, D>(ctx: &Ctx<'_, Inside>, features: &'a [Feature<D>]) -> Vec<&'a Feature<D>> {
    let all = ctx.either(false, true);
    features.iter().filter(|feature| all || feature.often).collect()
}

/// Compares what was said with runc and with ours, and with the page.
fn compare<D>(features: &[&Feature<D>], runc: &Said, ours: &Said) -> Result<()> {
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

/// Brings the host's firewall back to what it is before anybody uses it, after `first`.
fn without_firewall(ctx: &Ctx<'_, Inside>, first: &str) {
    let script = "for table in iptables ip6tables; do
        $table -P FORWARD ACCEPT
        for t in filter nat; do $table -t $t -F; $table -t $t -X; done
    done";
    let _ = ctx.cmd("sh").args(["-c", &format!("{first}\n{script}")]).run();
}

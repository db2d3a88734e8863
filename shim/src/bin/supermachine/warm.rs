//! `supermachine warm`: the warm containers of this host, from which others start.

use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use runtime_spec::annotations::PREFIX;
use serde_json::json;
use shim::config::{self, Options};
use shim::deadlines;
use shim::inventory::{self, Entry};
use shim::template::{Listed, Of, Store, Warm};
use shim::warm::Word;

use crate::progress::Progress;
use crate::template::{find, last_use, seconds};
use crate::{Failure, print, printable, ps};

const HEAD: [&str; 6] = ["KEY", "COMMAND", "WARM", "ON DISK", "USED", "FROM"];

/// Does what the words say.
pub fn run(root: &Path, words: &[String], json: bool) -> Result<ExitCode, Failure> {
    let store = Store::new(&config::of(&Options::default())?.template);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ls"] => list(root, &store, json)?,
        ["rm", keys @ ..] if !keys.is_empty() => {
            for key in keys {
                let key = find(&store, key)?;
                let warm = store.list()?.iter().any(|one| one.key == key && of(one).is_some());
                if !warm {
                    return Err(
                        format!("{key} is no warm container; supermachine warm ls lists those").into()
                    );
                }
                if !store.remove(&key, true)? {
                    return Err(format!("{key} is being kept right now; try again").into());
                }
                print(&format!("removed {key}\n"));
            }
        }
        ["build", id] => build(&inventory::find(root, None, id)?)?,
        _ => return Err("warm does ls, build ID and rm KEY...; supermachine --help says more".into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// As long as a shim waits, and keeps, at most.
const WITHIN: Duration = deadlines::WARM.saturating_add(deadlines::UPPER).saturating_add(deadlines::SAVE);

/// Waits until a container that was started to be warm is kept, or will not be.
fn build(entry: &Entry) -> Result<(), Failure> {
    let (directory, until) = (entry.paths.task(&entry.id), Instant::now() + WITHIN);
    let progress = Progress::of("looking at it");
    let said = loop {
        match Word::read(&directory) {
            Some(Word::Waits { when }) if entry.holder().is_some() => {
                if Instant::now() >= until {
                    let id = &entry.id;
                    return Err(format!("{id} was not kept within {WITHIN:?}; has it been started?").into());
                }
                progress.step(&format!("waiting until it is warm: {when}"), None);
            }
            Some(Word::Kept { key }) => break format!("{} is kept as {key}\n", entry.id),
            Some(Word::Started { key }) => break format!("{} has started from {key}\n", entry.id),
            Some(Word::Ordinary { why }) => {
                return Err(format!("nobody starts from {}: {why}", entry.id).into());
            }
            Some(Word::Waits { .. }) => {
                return Err(format!("{} has ended before it was kept", entry.id).into());
            }
            None if !directory.exists() => return Err(format!("{} is gone", entry.id).into()),
            None => {
                return Err(format!(
                    "{} was not asked to be warm; start it with the annotation {PREFIX}warm, as docs/warm.md has it",
                    entry.id
                )
                .into());
            }
        }
        sleep(PAUSE);
    };
    drop(progress);
    print(&said);
    Ok(())
}

fn of(one: &Listed) -> Option<&Warm> {
    match &one.about.as_ref()?.of {
        Of::Warm(warm) => Some(warm),
        _ => None,
    }
}

fn list(root: &Path, store: &Store, json: bool) -> Result<(), Failure> {
    let (listed, users) = (store.list()?, inventory::running_on(root));
    let warm: Vec<_> = listed.iter().filter_map(|one| Some((one, of(one)?))).collect();
    let count = |one: &Listed| users.get(one.key.as_str()).copied().unwrap_or(0);
    if json {
        let row = |(one, warm): &(&Listed, &Warm)| {
            json!({
                "key": one.key.as_str(), "command": warm.command, "when": warm.when, "container": warm.container,
                "layers": warm.layers, "bytes": one.bytes, "on_disk": one.on_disk,
                "used": one.used.and_then(seconds), "in_use": one.in_use, "machines": count(one),
            })
        };
        print(&format!("{:#}\n", json!(warm.iter().map(row).collect::<Vec<_>>())));
        return Ok(());
    }
    let rows: Vec<_> = warm.iter().map(|(one, warm)| row(one, warm, count(one), SystemTime::now())).collect();
    print(&ps::columns(&HEAD, &rows));
    Ok(())
}

/// So much of a command is told.
const LONGEST: usize = 40;

fn one_line(text: &str) -> String {
    let line = printable(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    if line.chars().count() <= LONGEST {
        line
    } else {
        line.chars().take(LONGEST - 1).chain(['…']).collect()
    }
}

fn row(one: &Listed, warm: &Warm, users: usize, now: SystemTime) -> [String; 6] {
    [
        one.key.as_str()[..12].to_owned(),
        one_line(&warm.command),
        one_line(&warm.when),
        format!("{} MiB", one.on_disk >> 20),
        last_use(one, users, now),
        warm.container.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_short_line() {
        assert_eq!(one_line("sh -c\n  'sleep 1'\t\x1b[2J"), "sh -c 'sleep 1' \u{fffd}[2J");
        let long = one_line(&"word ".repeat(30));
        assert!(long.chars().count() == LONGEST && long.ends_with('…'), "{long}");
    }
}

//! `supermachine template`: the templates of this host.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use runtime_spec::config::{Boot, Config};
use runtime_spec::host::Host;
use runtime_spec::plan;
use serde_json::json;
use shim::config::{self, Options};
use shim::host::{self, HostFiles};
use shim::journal::{Journal, Made};
use shim::template::build::{Step, make};
use shim::template::{self, Key, Listed, Of, Store, Unmade, Way};
use shim::{deadlines, inventory};

use crate::progress::Progress;
use crate::{Failure, print};

/// What a directory of ours begins with, in which a template is made; the process's number follows.
const MAKING: &str = "template-";

/// Does what the words say.
pub fn run(root: &Path, words: &[String], json: bool, all: bool) -> Result<ExitCode, Failure> {
    let config = config::of(&Options::default())?;
    let store = Store::new(&config.template);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ls"] => list(root, &store, json)?,
        ["build"] => build(root, &store, &config)?,
        ["rm", keys @ ..] if !keys.is_empty() => {
            for key in keys {
                let key = find(&store, key)?;
                if !store.remove(&key, true)? {
                    return Err(format!("template {key} is being made; wait until it is there").into());
                }
                print(&format!("removed {key}\n"));
            }
        }
        ["prune"] => {
            sweep(root);
            let removed = if all { prune_all(&store)? } else { store.prune(None)? };
            for key in removed {
                print(&format!("removed {key}\n"));
            }
        }
        _ => return Err("template does ls, build, rm KEY... and prune; supermachine --help says more".into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The machine of a container without limits.
pub fn machine(config: &Config) -> Result<plan::Machine, Failure> {
    let hostname = host::name();
    let host = Host { cpus: host::cpus(), memory: host::memory(), hostname: &hostname, files: &HostFiles };
    Ok(runtime_spec::size::unlimited(config, host)?)
}

/// The template whose key begins so.
pub fn find(store: &Store, key: &str) -> Result<Key, Failure> {
    let listed = store.list()?;
    let found: Vec<_> = listed.into_iter().filter(|one| one.key.as_str().starts_with(key)).collect();
    match found.as_slice() {
        [one] if !key.is_empty() => Ok(one.key.clone()),
        [] => {
            Err(format!("there is no template {key}; supermachine template ls lists those there are").into())
        }
        _ => Err(format!("{key} may be several templates; write more of it").into()),
    }
}

fn prune_all(store: &Store) -> Result<Vec<Key>, Failure> {
    store.prune(None)?;
    let mut removed = Vec::new();
    for one in store.list()?.into_iter().filter(|one| !one.in_use) {
        if store.remove(&one.key, false)? {
            removed.push(one.key);
        }
    }
    Ok(removed)
}

fn build(root: &Path, store: &Store, config: &Config) -> Result<(), Failure> {
    sweep(root);
    let progress = Progress::of("looking at kernel and initrd");
    let machine = machine(config)?;
    let parts = template::wanted(store, &machine)?;
    store.forget_failure(&parts.key()?);
    let directory = root.join("machines").join(format!("{MAKING}{}", std::process::id()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    progress.step("waiting for whoever makes it already", None);
    let of = Of::Template(parts.clone());
    let making = template::obtain(store, of, deadlines::TEMPLATE, async |making| {
        let failed =
            |error: std::io::Error| shim::error::Error::unknown(format!("{}: {error}", directory.display()));
        let journal = Journal::create(&directory).map_err(|error| Unmade::Here(failed(error)))?;
        let noted = |process| journal.note(Made::Process(process)).map_err(failed);
        let step = |step| {
            let text = match step {
                Step::Boot => "booting a machine",
                Step::Settle => "letting it settle",
                Step::Save => "saving it",
            };
            progress.step(text, None);
        };
        let made = make(&parts, making, &directory, noted, step).await;
        let undone = journal.undo().map_err(|error| Unmade::Here(failed(error)));
        made.and(undone)
    });
    let obtained = runtime.block_on(making);
    drop(progress);
    let (template, way) = obtained?;
    let said = match way {
        Way::Made => "made",
        Way::Found => "is there already:",
    };
    print(&format!("template {said} {}\n", template.directory.display()));
    if machine.boot == Boot::Cold {
        print("it is not used, since vm.boot is \"cold\"\n");
    }
    Ok(())
}

/// Removes what makers left that were killed.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root.join("machines")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(MAKING).and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(pid.to_string()).exists()
            && let Err(error) = Journal::load(&entry.path()).and_then(|journal| journal.undo())
        {
            eprintln!("supermachine: removing {}: {error}", entry.path().display());
        }
    }
}

fn list(root: &Path, store: &Store, json: bool) -> Result<(), Failure> {
    let (listed, users) = (store.list()?, inventory::running_on(root));
    let count = |key: &Key| users.get(key.as_str()).copied().unwrap_or(0);
    if json {
        let rows: Vec<_> = listed
            .iter()
            .map(|one| {
                json!({
                    "key": one.key.as_str(), "bytes": one.bytes, "on_disk": one.on_disk,
                    "used": one.used.and_then(seconds), "in_use": one.in_use, "machines": count(&one.key),
                    "made": one.about.as_ref().map(|about| about.made / 1_000_000_000),
                    "of": one.about.as_ref().map(|about| &about.of),
                })
            })
            .collect();
        print(&format!("{:#}\n", json!(rows)));
    } else {
        let rows: Vec<_> = listed.iter().map(|one| row(one, count(&one.key), SystemTime::now())).collect();
        print(&crate::ps::columns(&HEAD, &rows));
    }
    Ok(())
}

/// Since the epoch.
pub fn seconds(time: SystemTime) -> Option<u64> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

const HEAD: [&str; 6] = ["KEY", "OF", "MEMORY", "SIZE", "ON DISK", "USED"];

fn row(one: &Listed, users: usize, now: SystemTime) -> [String; 6] {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let (of, memory) = match one.about.as_ref().map(|about| &about.of) {
        None => ("?".to_owned(), "?".to_owned()),
        Some(Of::Template(parts)) => {
            let files =
                format!("kernel {}, initrd {}", short(&parts.kernel_digest), short(&parts.initrd_digest));
            (
                format!("{} of {} processors, {files}", parts.online, parts.cpus),
                format!("{}-{} MiB", parts.memory >> 20, parts.memory_max >> 20),
            )
        }
        Some(Of::Checkpoint(checkpoint)) => {
            (format!("checkpoint of {}", checkpoint.container), mib(one.bytes))
        }
        Some(Of::Warm(warm)) => (format!("warm container {}", warm.container), mib(one.bytes)),
    };
    [
        one.key.as_str()[..12].to_owned(),
        of,
        memory,
        mib(one.bytes),
        mib(one.on_disk),
        last_use(one, users, now),
    ]
}

fn short(digest: &str) -> String {
    digest.chars().take(8).collect()
}

/// By how many machines it is used, or how long ago it was.
pub fn last_use(one: &Listed, users: usize, now: SystemTime) -> String {
    let ago = one.used.and_then(|used| now.duration_since(used).ok()).map_or_else(|| "-".to_owned(), age);
    if one.in_use { format!("by {} now", users.max(1)) } else { format!("{ago} ago") }
}

fn age(age: Duration) -> String {
    match age.as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (seconds, text) in [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")] {
            assert_eq!(age(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn rows_also_of_what_cannot_be_read() {
        let key = Key::parse(&"0123456789abcdef".repeat(2)).unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let used = Some(now - Duration::from_secs(60));
        let one = Listed { key, about: None, bytes: 5 << 20, on_disk: 1 << 20, used, in_use: false };
        assert_eq!(row(&one, 0, now), ["0123456789ab", "?", "?", "5 MiB", "1 MiB", "60 s ago"]);
        let one = Listed { in_use: true, ..one };
        assert_eq!(row(&one, 3, now)[5], "by 3 now");
    }
}

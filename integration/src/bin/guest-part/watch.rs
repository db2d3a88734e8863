//! Watches files, and says what it hears of them: a line for each event, in letters like those of busybox's `inotifyd`.

use std::collections::HashMap;
use std::io::Write;

use anyhow::{Context, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

const LETTERS: [(AddWatchFlags, char); 8] = [
    (AddWatchFlags::IN_CREATE, 'n'),
    (AddWatchFlags::IN_DELETE, 'd'),
    (AddWatchFlags::IN_MOVED_FROM, 'm'),
    (AddWatchFlags::IN_MOVED_TO, 'y'),
    (AddWatchFlags::IN_MODIFY, 'c'),
    (AddWatchFlags::IN_CLOSE_WRITE, 'w'),
    (AddWatchFlags::IN_ATTRIB, 'e'),
    (AddWatchFlags::IN_DELETE_SELF, 'D'),
];

/// Until it is killed.
pub fn run(paths: &[&str]) -> Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).context("making inotify")?;
    let all = LETTERS.iter().fold(AddWatchFlags::empty(), |all, (flag, _)| all | *flag);
    let mut places = HashMap::new();
    for path in paths {
        let watch = inotify.add_watch(*path, all).with_context(|| format!("watching {path}"))?;
        places.insert(watch, *path);
    }
    let mut out = std::io::stdout();
    loop {
        for event in inotify.read_events().context("waiting for events")? {
            let Some(place) = places.get(&event.wd) else { continue };
            let name = event.name.map(|name| format!("\t{}", name.display())).unwrap_or_default();
            for (_, letter) in LETTERS.iter().filter(|(flag, _)| event.mask.contains(*flag)) {
                writeln!(out, "{letter}\t{place}{name}")?;
            }
        }
        out.flush()?;
    }
}

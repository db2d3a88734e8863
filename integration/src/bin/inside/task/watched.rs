//! Programs in a container that watch files of the host (inotify).

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use serde_json::Value;

use super::files::{add, bind, publish};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.watched",
        "who watches a directory or a file of a bind in a container hears of what the host does there, as with runc, also in a \
         read-only one, and once of what the container does itself",
        watched,
    )]
}

/// Tells what happens to two directories and a file; does besides what lines of input say.
const SCRIPT: &str = "/guest-part watch /rw /ro /file & while read line; do eval \"$line\"; done";

/// In which something is heard of, if it is watched by then.
const A_MOMENT: Duration = Duration::from_secs(2);

/// An event: a letter, and a path; names that are moved are like those that are made or removed.
type Event = (char, String);

/// What the host does, in a directory that is watched, and what has to be heard of it.
type Step = (&'static str, fn(&Path) -> Result<()>, &'static [(char, &'static str)]);

const STEPS: &[Step] = &[
    ("a file is made", |at| Ok(fs::write(at.join("a"), "1")?), &[('n', "a"), ('c', "a"), ('w', "a")]),
    ("a file is written to", |at| append(&at.join("a")), &[('c', "a"), ('w', "a")]),
    (
        "a file's rights are changed",
        |at| Ok(fs::set_permissions(at.join("a"), Permissions::from_mode(0o600))?),
        &[('e', "a")],
    ),
    ("a file is renamed", |at| Ok(fs::rename(at.join("a"), at.join("b"))?), &[('d', "a"), ('n', "b")]),
    (
        "a file takes the place of another",
        |at| {
            fs::write(at.join("new"), "2")?;
            Ok(fs::rename(at.join("new"), at.join("b"))?)
        },
        &[('n', "b")],
    ),
    ("a directory is made", |at| Ok(fs::create_dir(at.join("c"))?), &[('n', "c")]),
    ("a directory is removed", |at| Ok(fs::remove_dir(at.join("c"))?), &[('d', "c")]),
    ("a file is removed", |at| Ok(fs::remove_file(at.join("b"))?), &[('d', "b")]),
    (
        "a ConfigMap is swapped",
        |at| {
            publish(at, "..2", "2\n")?;
            Ok(fs::remove_dir_all(at.join("..1"))?)
        },
        &[('n', "..2"), ('n', "..data"), ('d', "..1")],
    ),
];

fn append(path: &Path) -> Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    Ok(file.write_all(b"more\n")?)
}

fn watched(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let mut heard = Vec::new();
    for (name, runtime) in [("runc", RUNC), ("ours", OURS)] {
        heard.push(hear(ctx, name, runtime).with_context(|| runtime.to_owned())?);
    }
    for (with_runc, with_ours) in heard[0].iter().zip(&heard[1]) {
        let more: Vec<_> = with_ours.1.difference(&with_runc.1).collect();
        ensure!(more.is_empty(), "when {}, {more:?} is heard, and with runc {:?}", with_ours.0, with_runc.1);
    }
    Ok(Outcome::Passed)
}

/// What is heard of each step.
fn hear(ctx: &Ctx<'_, Inside>, name: &str, runtime: &str) -> Result<Vec<(String, BTreeSet<Event>)>> {
    let api = ctx.world.api()?;
    let home = ctx.path(name);
    let (rw, ro, file) = (home.join("rw"), home.join("ro"), home.join("file"));
    for directory in [&rw, &ro] {
        publish(directory, "..1", "1\n")?;
    }
    fs::write(&file, "")?;
    let program = home.join("guest-part");
    fs::copy(&ctx.world.guest_part, &program)?;
    let edit = |spec: &mut Value| {
        let mounts = [
            bind(&rw, "/rw", &["rbind"]),
            bind(&ro, "/ro", &["rbind", "ro"]),
            bind(&file, "/file", &["bind"]),
            bind(&program, "/guest-part", &["bind", "ro"]),
        ];
        add(spec, mounts);
    };
    let mut task = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", SCRIPT], edit)?;
    task.container.start()?;
    // As soon as all are watched.
    for (touched, end) in [
        (rw.join("probe"), "w\t/rw\tprobe\n"),
        (ro.join("probe"), "w\t/ro\tprobe\n"),
        (file.clone(), "w\t/file\n"),
    ] {
        until(&format!("to hear of {}", touched.display()), A_WHILE, || {
            if let Err(error) = append(&touched) {
                return Attempt::Pending(format!("{error:#}"));
            }
            match task.stdout.read_until(end, A_MOMENT) {
                Ok(_) => Attempt::Done(()),
                Err(error) => Attempt::Pending(format!("{error:#}")),
            }
        })?;
    }
    let mut all = Vec::new();
    for (place, directory) in [("/rw", &rw), ("/ro", &ro)] {
        settle(&mut task, directory, place, "before")?;
        for (number, (about, act, must)) in STEPS.iter().enumerate() {
            act(directory)?;
            let lines = settle(&mut task, directory, place, &format!("end{number}"))?;
            let events: BTreeSet<_> = lines.iter().filter_map(|line| event(line)).collect();
            let about = format!("{about} in {place}");
            for (letter, name) in *must {
                let wanted = (*letter, format!("{place}/{name}"));
                ensure!(events.contains(&wanted), "when {about}, {wanted:?} is not heard, but {lines:?}");
            }
            all.push((about, events));
        }
    }
    // What the container does itself is told of as often as with runc.
    task.stdin.write(b"echo own >/rw/own; echo more >>/rw/own; rm /rw/own\n")?;
    let own = task.stdout.read_until("d\t/rw\town\n", A_WHILE)?;
    let mut own = String::from_utf8_lossy(&own).into_owned();
    own += &settle(&mut task, &rw, "/rw", "last")?.join("\n");
    let own: Vec<_> = own.lines().filter_map(event).filter(|(_, path)| path == "/rw/own").collect();
    let expected = ['n', 'c', 'w', 'c', 'w', 'd'].map(|letter| (letter, "/rw/own".to_owned()));
    ensure!(own == expected, "of what the container does itself is heard {own:?}");
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    Ok(all)
}

/// All lines until that of a file which is made now is heard.
fn settle(task: &mut Piped<'_>, directory: &Path, place: &str, name: &str) -> Result<Vec<String>> {
    fs::create_dir(directory.join(name))?;
    let end = format!("n\t{place}\t{name}\n");
    let lines = task.stdout.read_until(&end, A_WHILE)?;
    let lines = String::from_utf8_lossy(&lines).into_owned();
    Ok(lines.lines().filter(|line| format!("{line}\n") != end).map(str::to_owned).collect())
}

fn event(line: &str) -> Option<Event> {
    let mut words = line.split('\t');
    let (letters, place) = (words.next()?, words.next()?);
    let letter = match letters.chars().next()? {
        'y' => 'n',
        'm' => 'd',
        letter => letter,
    };
    Some((letter, words.next().map_or_else(|| place.to_owned(), |name| format!("{place}/{name}"))))
}

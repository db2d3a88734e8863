//! Other processes that take part in a case: they do what they are told over a pipe and tell what came of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, pipe, setgroups, setresgid, setresuid};

use super::words::{Fault, Told, wrong};
use super::world::World;

pub struct Actor {
    /// None once it has been told to end.
    steps: Option<File>,
    outcomes: BufReader<File>,
    /// None where it is somebody else's child.
    pid: Option<Pid>,
}

impl Actor {
    /// A process that knows the world as it is now.
    pub fn begin(name: &str, world: &mut World) -> Result<Self, Fault> {
        let (steps_out, steps_in) = pipe()?;
        let (outcomes_out, outcomes_in) = pipe()?;
        // SAFETY: this program has one thread, so the child finds no lock held that nobody will release.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                steps: Some(steps_in.into()),
                outcomes: BufReader::new(outcomes_out.into()),
                pid: Some(child),
            }),
            ForkResult::Child => {
                drop((steps_in, outcomes_out));
                world.leave_actors();
                let served =
                    become_user(name).and_then(|()| serve(world, steps_out.into(), outcomes_in.into()));
                std::process::exit(i32::from(served.is_err()));
            }
        }
    }

    /// Has nothing more to do with it, in a process that is not its parent.
    pub fn leave(mut self) {
        self.pid = None;
    }

    pub fn ask(&mut self, step: &str) -> Result<(), Fault> {
        match &mut self.steps {
            Some(steps) => Ok(writeln!(steps, "{step}")?),
            None => wrong("it has ended"),
        }
    }

    pub fn answer(&mut self) -> Told {
        let mut line = String::new();
        self.outcomes.read_line(&mut line)?;
        match line.trim_end().split_once(' ') {
            Some(("told", outcome)) => Ok(outcome.to_owned()),
            Some(("failed", errno)) => Err(Fault::Named(errno.to_owned())),
            Some((_, why)) => wrong(why),
            None => wrong("the other process has died"),
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Without steps it ends.
        self.steps = None;
        if let Some(pid) = self.pid {
            let _ = waitpid(pid, None);
        }
    }
}

fn become_user(name: &str) -> Result<(), Fault> {
    let (id, groups): (u32, &[u32]) = match name {
        "b" | "c" => return Ok(()),
        "u" => (1000, &[]),
        "v" => (1001, &[1000]),
        _ => return wrong(format!("{name} is nobody")),
    };
    setgroups(&groups.iter().map(|group| Gid::from_raw(*group)).collect::<Vec<_>>())?;
    setresgid(Gid::from_raw(id), Gid::from_raw(id), Gid::from_raw(id))?;
    setresuid(Uid::from_raw(id), Uid::from_raw(id), Uid::from_raw(id))?;
    Ok(())
}

fn serve(world: &mut World, steps: File, mut outcomes: File) -> Result<(), Fault> {
    for step in BufReader::new(steps).lines() {
        match world.step(&step?) {
            Ok(Ok(outcome)) => writeln!(outcomes, "told {outcome}")?,
            Ok(Err(errno)) => writeln!(outcomes, "failed {errno}")?,
            Err(why) => writeln!(outcomes, "wrong {why}")?,
        }
    }
    Ok(())
}

//! What a case works with, and how its steps are run one after the other.
//!
//! A step is a verb and its arguments: `rename a b noreplace`. `@b` before it has another process do it: `@b` and
//! `@c` are root's like the first, `@u` is user 1000's, `@v` is user 1001's who is in group 1000, too. `@b&` does
//! not wait; a later `wait b` does.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::actor::Actor;
use super::verbs;
use super::verbs::maps::Map;
use super::words::{Fault, Told, expand, number, wrong};

/// Times of a file: access, modification, change.
pub type Times = [(i64, i64); 3];

/// What a call told, or the name of its error.
pub type Outcome = Result<String, String>;

#[derive(Default)]
pub struct World {
    fds: BTreeMap<u32, OwnedFd>,
    pub maps: BTreeMap<u32, Map>,
    pub marks: BTreeMap<String, Times>,
    actors: BTreeMap<String, Actor>,
}

impl World {
    pub fn fd(&self, slot: &str) -> Result<BorrowedFd<'_>, Fault> {
        match self.fds.get(&number(slot)?) {
            Some(fd) => Ok(fd.as_fd()),
            None => Err(Fault::Named("not-open".to_owned())),
        }
    }

    pub fn put(&mut self, slot: &str, fd: OwnedFd) -> Told {
        self.fds.insert(number(slot)?, fd);
        Ok(String::new())
    }

    pub fn close(&mut self, slot: &str) -> Told {
        match self.fds.remove(&number(slot)?) {
            Some(_) => Ok(String::new()),
            None => Err(Fault::Named("not-open".to_owned())),
        }
    }

    /// Runs a step and says in a word what came of it: what it tells, or why it failed.
    pub fn step(&mut self, step: &str) -> Result<Outcome, String> {
        let told = match step.strip_prefix('@').and_then(|rest| rest.split_once(' ')) {
            Some((name, rest)) => self.by_another(name, rest),
            None => self.by_us(step),
        };
        match told {
            Ok(said) if said.is_empty() => Ok(Ok("ok".to_owned())),
            Ok(said) => Ok(Ok(said)),
            Err(Fault::Call(errno)) => Ok(Err(format!("{errno:?}"))),
            Err(Fault::Named(name)) => Ok(Err(name)),
            Err(Fault::Case(why)) => Err(format!("{step}: {why}")),
        }
    }

    fn by_us(&mut self, step: &str) -> Told {
        let words: Vec<String> = step.split_whitespace().map(expand).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words[..] {
            ["wait", name] => self.actor(name)?.answer(),
            [verb, ref args @ ..] => verbs::call(self, verb, args),
            [] => wrong("there is nothing to do"),
        }
    }

    fn by_another(&mut self, name: &str, step: &str) -> Told {
        if let Some(name) = name.strip_suffix('&') {
            self.actor(name)?.ask(step)?;
            return Ok("begun".to_owned());
        }
        let actor = self.actor(name)?;
        actor.ask(step)?;
        actor.answer()
    }

    /// The process called `name`, which begins with what is open here when it is first asked.
    fn actor(&mut self, name: &str) -> Result<&mut Actor, Fault> {
        if !self.actors.contains_key(name) {
            let actor = Actor::begin(name, self)?;
            self.actors.insert(name.to_owned(), actor);
        }
        self.actors.get_mut(name).ok_or_else(|| Fault::Case("it has just been put there".to_owned()))
    }

    /// In a new process: the other ones are not its children, and an end of their pipes here would keep them alive.
    pub fn leave_actors(&mut self) {
        std::mem::take(&mut self.actors).into_values().for_each(Actor::leave);
    }
}

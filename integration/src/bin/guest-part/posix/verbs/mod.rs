//! What a step may do: one verb a call, in a file for each family.

mod attributes;
mod directories;
mod files;
mod locks;
pub mod maps;
mod names;
mod programs;
mod xattrs;

use super::words::{Told, wrong};
use super::world::World;

pub use names::name_of as kind_name;
pub use programs::wait;
pub use xattrs::told as attributes_of;

/// Does it, if it is of the family.
type Family = fn(&mut World, &str, &[&str]) -> Option<Told>;

const FAMILIES: [Family; 8] = [
    names::call,
    files::call,
    attributes::call,
    xattrs::call,
    locks::call,
    directories::call,
    maps::call,
    programs::call,
];

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Told {
    FAMILIES
        .iter()
        .find_map(|family| family(world, verb, args))
        .unwrap_or_else(|| wrong(format!("there is no {verb} of {} words", args.len())))
}

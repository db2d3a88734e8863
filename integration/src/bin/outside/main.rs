//! The tests that run on a developer's machine and drive the emulated host from outside, as its users do.

mod boots;
mod carried;
mod ended;
mod troubled;
mod world;

use std::process::ExitCode;

use integration::Test;
use world::Outside;

fn main() -> ExitCode {
    let tests: Vec<Test<Outside>> =
        [carried::tests(), boots::tests(), ended::tests(), troubled::tests()].into_iter().flatten().collect();
    integration::run("outside", &tests)
}

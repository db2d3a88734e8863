//! The tests that run in the emulated host, next to containerd and our programs.
//!
//! `control.*` is the control group: nothing of the product takes part, so when one of these fails the host
//! is broken and not supermachine.

mod agent;
mod answers;
mod client;
mod kvm;
mod own;
mod runc_api;
mod runc_ctr;
mod share;
mod task;
mod vmm;
mod world;

use std::process::ExitCode;

use integration::Test;
use world::Inside;

fn main() -> ExitCode {
    let tests: Vec<Test<Inside>> = [
        answers::tests(),
        runc_ctr::tests(),
        runc_api::tests(),
        kvm::tests(),
        share::tests(),
        vmm::tests(),
        agent::tests(),
        task::tests(),
        client::tests(),
    ]
    .into_iter()
    .flatten()
    .collect();
    integration::run("inside", &tests)
}

//! `containerd-shim-supermachine-v2`, which containerd executes; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim::cli::main(std::env::args_os().skip(1))
}

//! The command line. Exit codes: 0 as wished, 1 it did not work, 2 the command makes no sense.

mod check;
mod control;
mod ctl;
mod disks;
mod heap;
mod jail;
mod log;
mod net;
mod options;
mod run;
mod snapshot;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use lexopt::prelude::*;

const USAGE: &str = "\
One process, one microVM.

Usage:
  supermachine-vmm check [--json]    say whether this host can run microVMs, and what to mend if not
  supermachine-vmm run --kernel FILE [options]
                                     boot a machine by hand
  supermachine-vmm run --restore DIR [options]
                                     go on from a snapshot
  supermachine-vmm ctl PATH COMMAND  drive the machine whose control socket is at PATH
  supermachine-vmm inspect DIR [--verify] [--all]
                                     print what a snapshot is; read all of it before; print all of its state
  supermachine-vmm fingerprint       print what decides whether a snapshot can go on here, in JSON
  supermachine-vmm --version
  supermachine-vmm --help

Options of run:
  --restore DIR      instead of a kernel, with its options up to --cpus and --psci: the snapshot in DIR.
                     Devices are given as they were when it was taken, wherever they lead now
  --kernel FILE      vmlinux or bzImage with PVH (x86_64), Image (arm64)
  --initrd FILE      initial root file system
  --append TEXT      more for the kernel's command line
  --memory SIZE      guest RAM, like 512M or 2G (256M)
  --memory-max SIZE  guest RAM to which the machine can grow while it runs
  --cpus N           processors (1)
  --console WHERE    stdio, pty, none, file:PATH or unix:PATH (stdio); Ctrl-] on a terminal stops; a file
                     keeps the last MiB
  --marker TEXT      say when a line of the console has this in it, again for more
  --control PATH|fd:N
                     serve a control socket there, or for whoever holds the other end of N, to whom
                     the machine then belongs: it stops when they are gone
  --jail DIR         give up all rights and paths that the machine does not need; the new root is
                     built over DIR, in which nothing changes
  --netns PATH|fd:N, --cgroup DIR
                     with --jail: join them before
  --paused           do not begin before a resume by the control socket
  --share TAG=DIR[:ro][:cache=WHAT][:news=GROUP]
                     a directory, for the guest to mount by its tag (type virtiofs); it remembers
                     what it has read for a moment (auto), as long as it likes (always) or never;
                     four groups, from GROUP on, bring its programs news of what the host has
                     changed, by requests that change nothing
  --block FILE[:ro|:rw][:serial=ID]
                     a disk with this raw image or block device, again for more disks; the guest sees
                     its serial number, without one its name. A FILE whose own name ends like that is
                     given with both behind it
  --drive none|FILE[:ro|:rw][:serial=ID]
                     a drive, empty or with such a disk, again for more drives: disks are put in and taken
                     out while no driver of the guest's is at work on it (ctl disk, ctl eject)
  --tap NAME[:N][,rx=SIZE][,tx=SIZE][,mac=ADDRESS][,vhost]
                     a network device on this tap, with N queues (1), again for more; rx and tx limit
                     the bytes a second to and from the guest; with vhost the host's kernel moves its
                     packets (/dev/vhost-net). Instead of a name: fd:N+N... for the descriptors of an
                     open tap, none[:N] for one that comes later by ctl tap
  --nic stream:PATH|datagram:PATH[,rx=SIZE][,tx=SIZE][,mac=ADDRESS]
                     a network device whose cable ends in a unix socket that somebody listens on: passt
                     (stream), gvproxy or vmnet-helper (datagram); counts as one more --tap
  --log LEVEL        what to say on stderr: off, error, warn, info, debug, trace (warn)
  --psci WHO         kernel or userspace: who turns an arm64 guest's processors on and off (kernel)
  --vsock DIR        streams: connect to DIR/vsock and write \"CONNECT PORT\" to reach the guest;
                     the guest reaches DIR/vsock_PORT

Commands of ctl:
  state | stats      what the machine does; what it has done, in JSON
  pause [MS] | resume
                     let the guest stand still, if that can be had in that time (5000); let it go on
  look               where a paused machine stands: registers; of each device its status, what its driver has
                     not heard of, and of its queues what was offered, taken and given back
  button | stop | kill
                     press the power button; end the guest; end the monitor
  resize [--memory SIZE] [--cpus N]
                     give the guest more, or less
  snapshot DIR [--over DIR]
                     write the machine into a new directory; a guest that runs stands still meanwhile.
                     Of its memory only what it has changed since it was restored from the second
  reset              put a machine that was restored, and is paused, back to where its snapshot was taken
  tap SLOT NAME[:N][,vhost]
                     plug a tap into a network device, like net.0, the first --tap
  nic SLOT stream:PATH|datagram:PATH
                     plug a socket into one, as --nic does
  disk DRIVE FILE[:ro|:rw][:serial=ID]
                     put a disk into a drive, like drive.0, the first --drive
  eject DRIVE        take it out
  log | console      print what the console shows; join it (Ctrl-] leaves)
  events             print what happens, one JSON object a line, until the end

SIGTERM presses the power button once, SIGINT, SIGHUP and a second SIGTERM stop the machine.
Exit codes of run: 0 the guest turned itself off, 1 it could not be run, 3 it asked for a reset,
4 its kernel panicked, 5 it crashed, 6 it was stopped.
";

/// How long another process may take to answer, beyond what it was asked to wait.
const WITHIN: std::time::Duration = std::time::Duration::from_secs(10);

/// What is wrong with the words of the command line.
type Usage = lexopt::Error;

/// Runs the command that `args` (without the program's name) ask for.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match run(lexopt::Parser::from_args(args)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("supermachine-vmm: {error}; see supermachine-vmm --help");
            ExitCode::from(2)
        }
    }
}

fn run(mut args: lexopt::Parser) -> Result<ExitCode, Usage> {
    match args.next()? {
        Some(Long("version") | Short('V')) => {
            println!("supermachine-vmm {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
        Some(Long("help") | Short('h')) => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        Some(Value(command)) => match command.to_str() {
            Some("check") => check::main(args),
            Some("run") => run::main(args),
            Some("ctl") => ctl::main(args),
            Some("inspect") => snapshot::inspect(args),
            Some("fingerprint") => snapshot::fingerprint(args),
            _ => Err(format!("there is no command {}", command.display()).into()),
        },
        Some(other) => Err(other.unexpected()),
        None => Err("a command is missing".into()),
    }
}

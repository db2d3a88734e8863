//! The part of the tests and benchmarks that runs elsewhere: in a guest, to which it is brought in the initrd,
//! or in the host that is measured.

mod busy;
mod button;
mod churn;
mod flood;
mod mapped;
mod mapping;
mod posix;
mod random;
mod scribble;
mod tcp;
mod udp;
mod unix;
mod vsock;
mod watch;
mod witness;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use integration::{boot_time, pattern, tree};

const USAGE: &str = "\
usage: guest-part serve PORT                  answer streams on a vsock port
       guest-part call PORT SEED LENGTH       send a pattern to a vsock port of the host
       guest-part call-unix PATH SEED LENGTH  send a pattern to a unix socket
       guest-part serve-tcp PORT              answer streams on a TCP port
       guest-part serve-udp PORT              send datagrams back where they come from
       guest-part tree make|check DIR COUNT SEED
       guest-part posix table DIR [PREFIX]    try what file system calls do, each case in a directory below DIR
       guest-part posix try DIR STEPS         try some steps, written like those of the table's cases
       guest-part posix make-for-reading DIR  make what the next works on
       guest-part posix read-only DIR         try calls that would change it
       guest-part posix tree|contents DIR     tell all there is below DIR, with inodes or contents
       guest-part churn SEED                  take and free memory, as many MiB as each line of input says
       guest-part scribble SEED ROUNDS        misuse every device
       guest-part wild SEED ACCESSES          write anything to any register, whatever becomes of the guest
       guest-part flood THREADS SECONDS PORT PORT
                                              connect to ports of the host and send as much as they take
       guest-part witness CPUS FILE           watch clocks, timers and registers, and write what was seen
       guest-part busy DIR                    do a little of everything, check it, and say a line for each step
       guest-part map FILE SEED LENGTH        write a pattern to a mapped file, and stay
       guest-part burst SEED LENGTH           write a pattern at once, and end
       guest-part watch PATH...               watch files, and say what happens to them
       guest-part button                      wait for the power button, and turn the machine off
       guest-part boot-time RUNS FILE         boot our machine and QEMU's in turn, on a host";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // A machine's first process is asked for nothing; a container's is.
    if std::process::id() == 1 && words.is_empty() {
        boot_time::init();
    }
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-part: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port] => vsock::serve(number(port)?),
        ["serve-tcp", port] => tcp::serve(number(port)?),
        ["serve-udp", port] => udp::serve(number(port)?),
        ["call", port, seed, length] => vsock::call(number(port)?, number(seed)?, number(length)?),
        ["call-unix", path, seed, length] => unix::call(path, number(seed)?, number(length)?),
        ["tree", "make", dir, count, seed] => tree::make(&PathBuf::from(dir), number(count)?, number(seed)?),
        ["tree", "check", dir, count, seed] => {
            tree::check(&PathBuf::from(dir), number(count)?, number(seed)?)
        }
        ["posix", rest @ ..] => posix::call(rest),
        ["churn", seed] => churn::run(number(seed)?),
        ["scribble", seed, rounds] => scribble::run(number(seed)?, number(rounds)?),
        ["wild", seed, accesses] => scribble::wild(number(seed)?, number(accesses)?),
        ["flood", threads, seconds, ports @ ..] => {
            let ports: Vec<u32> = ports.iter().map(|port| number(port)).collect::<Result<_>>()?;
            flood::run(number(threads)?, number(seconds)?, &ports)
        }
        ["witness", cpus, file] => witness::watch(number(cpus)?, Path::new(file)),
        ["busy", dir] => busy::work(Path::new(dir)),
        ["busy-answer"] => busy::answer(),
        ["busy-end", code] => std::process::exit(number(code)?),
        ["map", path, seed, length] => mapped::write(path, number(seed)?, number(length)?),
        // All of it is made before, so that the reader is behind when this ends.
        ["burst", seed, length] => {
            let bytes = pattern::bytes(number(seed)?, number(length)?);
            io::stdout().write_all(&bytes).context("writing to stdout")
        }
        ["watch", paths @ ..] => watch::run(paths),
        ["button"] => button::wait(),
        ["boot-time", runs, file] => {
            let guest = Path::new("/usr/share/supermachine/guest");
            let samples = boot_time::measure(guest, Path::new("supermachine-vmm"), number(runs)?)?;
            fs::write(file, serde_json::to_vec(&samples)?).with_context(|| format!("writing {file}"))
        }
        _ => bail!("this makes no sense\n{USAGE}"),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().with_context(|| format!("{text} is no number"))
}

//! `ctr`, containerd's own command line.

use std::ffi::OsStr;
use std::path::PathBuf;

use crate::command::Cmd;

/// Where `ctr` is pointed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ctr {
    /// containerd's socket.
    pub address: PathBuf,
    /// The namespace that containers are made in.
    pub namespace: String,
    /// What containers are made from.
    pub image: String,
}

impl Ctr {
    /// `command` is a bare `ctr`, with the deadline it shall have; `arguments` follow the global options.
    pub fn with<A: AsRef<OsStr>>(&self, command: Cmd, arguments: impl IntoIterator<Item = A>) -> Cmd {
        command.arg("--address").arg(&self.address).args(["--namespace", &self.namespace]).args(arguments)
    }

    /// The words of a command line with these arguments.
    pub fn words(&self, arguments: &[&str]) -> Vec<String> {
        let address = self.address.display().to_string();
        let options = ["ctr", "--address", &address, "--namespace", &self.namespace];
        options.iter().chain(arguments).map(|&word| word.to_owned()).collect()
    }

    /// Runs `process` in a new container `id` of the image, and removes it after.
    pub fn run(&self, command: Cmd, runtime: &str, id: &str, process: &[&str]) -> Cmd {
        self.with(command, ["run", "--rm", "--runtime", runtime, &self.image, id]).args(process)
    }
}

//! `start`: which containerd asks, and the answer that it understands.
//!
//! | containerd | on standard input | answer |
//! |---|---|---|
//! | 1.6, 1.7 | runtime options, or nothing | the address, for Task v2 |
//! | 2.0 to 2.2 | runtime options, or nothing | JSON, for Task v3 |
//! | from 2.3 | `BootstrapParams` | `BootstrapResult`, for Task v3 |
//!
//! Parameters and options can each be read as the other; only the names in them tell. The shim serves both versions of
//! Task, so whoever cannot be told is given the address, which all understand.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use crate::args::Args;
use crate::deadlines;
use crate::paths::hash;
use crate::process;

/// What a containerd understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The address.
    Plain,
    /// A JSON object.
    Json,
    /// A `BootstrapResult`.
    Protobuf,
}

/// The parameters on standard input, if it is these.
pub fn params(args: &Args, input: &[u8]) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let ours = params.instance_id == args.id && params.namespace == args.namespace && !args.id.is_empty();
    ours.then_some(params)
}

/// The answer to `start`.
pub fn answer(dialect: Dialect, address: &str) -> Vec<u8> {
    let protobuf = || {
        let result = BootstrapResult {
            version: 3,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        result.write_to_bytes().ok()
    };
    match dialect {
        Dialect::Plain => None,
        Dialect::Json => {
            let object = serde_json::json!({ "version": 3, "address": address, "protocol": "ttrpc" });
            serde_json::to_vec(&object).ok()
        }
        Dialect::Protobuf => protobuf(),
    }
    .unwrap_or_else(|| address.as_bytes().to_vec())
}

/// What a containerd that gave no parameters understands. Its binary is asked for its version, once: what it said
/// stays in `cache`.
pub fn dialect_of(binary: &Path, cache: &Path) -> Dialect {
    let Ok(metadata) = fs::metadata(binary) else { return Dialect::Plain };
    let key = format!("{} {} {} {}", metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
    let cached = fs::read_to_string(cache).unwrap_or_default();
    let version = match cached.split_once('\n') {
        Some((of, version)) if of == key => version.to_owned(),
        _ => {
            let version = ask_version(binary).unwrap_or_default();
            let _ = fs::write(cache, format!("{key}\n{version}"));
            version
        }
    };
    dialect_of_version(&version)
}

/// Of `containerd github.com/containerd/containerd/v2 2.1.4 ...`.
fn dialect_of_version(text: &str) -> Dialect {
    let is_version =
        |word: &&str| word.trim_start_matches('v').starts_with(|first: char| first.is_ascii_digit());
    let word = text.split_whitespace().find(is_version).unwrap_or_default();
    let major: u32 =
        word.trim_start_matches('v').split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if major >= 2 { Dialect::Json } else { Dialect::Plain }
}

fn ask_version(binary: &Path) -> Option<String> {
    let mut command = Command::new(binary);
    command.arg("--version");
    let said = process::output(command, deadlines::ASK).ok()?;
    Some(String::from_utf8_lossy(&said.stdout).into_owned())
}

/// Where a shim listens: a name that every shim of the same group finds.
pub fn socket_path(directory: &Path, containerd: &str, namespace: &str, group: &str) -> PathBuf {
    directory.join(hash(&[containerd, namespace, group]))
}

/// Where sockets are, unless containerd says.
pub const SOCKETS: &str = "/run/containerd/s";

/// A shim's socket: one to serve, or one that another serves already.
#[derive(Debug)]
pub enum Socket {
    /// It listens.
    Ours(UnixListener),
    /// Somebody answers there.
    Theirs,
}

/// Listens at `path`, or finds who does. What a dead shim left there is replaced.
pub fn listen(path: &Path) -> io::Result<Socket> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    for _ in 0..3 {
        match UnixListener::bind(path) {
            Ok(listener) => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                return Ok(Socket::Ours(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
        if UnixStream::connect(path).is_ok() {
            return Ok(Socket::Theirs);
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{} is taken and nobody answers", path.display())))
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn parameters_and_options_are_told_apart() {
        let args = Args { id: "c1".into(), namespace: "default".into(), ..Args::default() };
        let sent = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/t".into(),
            ..BootstrapParams::default()
        };
        let found = params(&args, &sent.write_to_bytes().unwrap()).unwrap();
        assert_eq!(found.containerd_ttrpc_address, "/t");
        let options = Any { type_url: "c1".into(), value: b"other".to_vec(), ..Any::default() };
        for other in [Vec::new(), options.write_to_bytes().unwrap(), vec![0xff; 9]] {
            assert_eq!(params(&args, &other), None);
        }
    }

    #[test]
    fn answers() {
        assert_eq!(answer(Dialect::Plain, "unix:///a"), b"unix:///a");
        let json: serde_json::Value = serde_json::from_slice(&answer(Dialect::Json, "unix:///a")).unwrap();
        assert_eq!(json, serde_json::json!({"version": 3, "address": "unix:///a", "protocol": "ttrpc"}));
        let result = BootstrapResult::parse_from_bytes(&answer(Dialect::Protobuf, "unix:///a")).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, "unix:///a", "ttrpc")
        );
    }

    #[test]
    fn versions() {
        for (text, dialect) in [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1", Dialect::Plain),
            ("containerd github.com/containerd/containerd v1.7.24 88bf19b", Dialect::Plain),
            ("containerd github.com/containerd/containerd/v2 v2.0.1 88aa2f5", Dialect::Json),
            ("containerd containerd.io 2.1.9~ds1 2.1.9", Dialect::Json),
            ("", Dialect::Plain),
            ("containerd", Dialect::Plain),
        ] {
            assert_eq!(dialect_of_version(text), dialect, "{text}");
        }
    }

    #[test]
    fn sockets_of_dead_shims_are_replaced() {
        let directory = std::env::temp_dir().join(format!("bootstrap-{}", std::process::id()));
        let path = socket_path(&directory.join("s"), "/c", "ns", "id");
        let Socket::Ours(first) = listen(&path).unwrap() else { panic!("nobody listens yet") };
        assert!(matches!(listen(&path).unwrap(), Socket::Theirs));
        drop(first);
        assert!(matches!(listen(&path).unwrap(), Socket::Ours(_)));
        fs::remove_dir_all(&directory).unwrap();
    }
}

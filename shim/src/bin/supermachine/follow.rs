//! Files that somebody else writes, and may cut.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::{Failure, printable};

const PAUSE: Duration = Duration::from_millis(200);
const PIECE: u64 = 64 * 1024;

/// Prints the file, and if asked what is added until it is removed.
pub fn print(path: &Path, follow: bool) -> Result<(), Failure> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(
                format!("{} is not there: the container has none, or has just gone", path.display()).into()
            );
        }
        other => other.map_err(|error| format!("opening {}: {error}", path.display()))?,
    };
    loop {
        let mut piece = Vec::new();
        file.by_ref().take(PIECE).read_to_end(&mut piece)?;
        if !piece.is_empty() {
            crate::print(&printable(&String::from_utf8_lossy(&piece)));
            continue;
        }
        if !follow || !path.exists() {
            return Ok(());
        }
        // Its older half has gone.
        if file.metadata()?.len() < file.stream_position()? {
            file.seek(SeekFrom::Start(0))?;
        }
        thread::sleep(PAUSE);
    }
}

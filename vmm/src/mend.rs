//! What to do about a file or directory that cannot be used, for the end of a message.

use std::io::{Error, ErrorKind};

/// By what the host said of it.
pub fn of(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; give one that is there",
        ErrorKind::PermissionDenied => "; let the user of this process have it, or give another",
        ErrorKind::IsADirectory => "; give a file",
        ErrorKind::NotADirectory => "; give a directory",
        ErrorKind::InvalidInput => "; give another",
        _ => "",
    }
}

/// The same for what is to be written.
pub fn to_write(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; let the user of this process write it, or give it read-only (:ro)"
        }
        _ => of(error),
    }
}

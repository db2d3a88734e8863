//! What a kernel file is, from its first bytes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::mend;

/// How much of a file [`Format::of`] wants to see.
pub const HEAD: usize = 4096;

/// A kernel file's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An ELF file for the machine of that number.
    Elf {
        /// e_machine.
        machine: u16,
    },
    /// An x86 kernel with its own decompressor in front.
    BzImage,
    /// An uncompressed arm64 kernel.
    Arm64Image,
    /// Something compressed by gzip, which is how some distributions ship arm64 kernels.
    Gzip,
    /// None of these.
    Unknown,
}

/// e_machine of x86_64.
pub const EM_X86_64: u16 = 62;
/// e_machine of aarch64.
pub const EM_AARCH64: u16 = 183;

impl Format {
    /// Of a file that begins with `head`.
    pub fn of(head: &[u8]) -> Self {
        let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
        if at(0, b"\x7fELF") {
            let machine = head.get(18..20).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
            Self::Elf { machine }
        } else if at(0x1fe, &[0x55, 0xaa]) && at(0x202, b"HdrS") {
            Self::BzImage
        } else if at(0x38, b"ARM\x64") {
            Self::Arm64Image
        } else if at(0, &[0x1f, 0x8b]) {
            Self::Gzip
        } else {
            Self::Unknown
        }
    }

    /// For messages.
    pub fn describe(self) -> String {
        match self {
            Self::Elf { machine: EM_X86_64 } => "an ELF file for x86_64".into(),
            Self::Elf { machine: EM_AARCH64 } => "an ELF file for aarch64".into(),
            Self::Elf { machine } => format!("an ELF file for machine {machine}"),
            Self::BzImage => "a bzImage for x86".into(),
            Self::Arm64Image => "an Image for arm64".into(),
            Self::Gzip => "a file compressed by gzip".into(),
            Self::Unknown => "no kernel".into(),
        }
    }
}

/// A kernel or an initrd could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened or read.
    #[error("cannot read {what} {}: {source}{}", path.display(), mend::of(source))]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is a kernel, or something else, but none that this machine boots.
    #[error("{} is {found}; this machine boots {wanted}", path.display())]
    Format {
        /// Its path.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What would do.
        wanted: &'static str,
    },
    /// It is what it should be, but damaged.
    #[error("kernel {} is damaged or cut short: {why}; fetch it again", path.display())]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// It does not fit into guest RAM.
    #[error(
        "{what} {} needs {needed} bytes and the guest's RAM has room for {room}; give the guest more memory",
        path.display()
    )]
    TooLarge {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Its size in memory.
        needed: u64,
        /// What there is.
        room: u64,
    },
}

/// An open kernel or initrd.
#[derive(Debug)]
pub struct Image {
    /// Kernel or initrd, for messages.
    pub what: &'static str,
    /// Where it is from.
    pub path: PathBuf,
    /// The file, at its beginning.
    pub file: File,
    /// Its length.
    pub len: u64,
}

impl Image {
    /// Opens a file.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { what, path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
        }
        Ok(Self { what, path: path.to_owned(), file, len: metadata.len() })
    }

    /// The first bytes, fewer if the file is shorter. The file is at its beginning again after.
    pub fn head(&mut self) -> Result<Vec<u8>, Error> {
        let mut head = Vec::with_capacity(HEAD);
        let read = (&self.file)
            .take(HEAD as u64)
            .read_to_end(&mut head)
            .and_then(|_| self.file.seek(SeekFrom::Start(0)));
        match read {
            Ok(_) => Ok(head),
            Err(source) => Err(self.unreadable(source)),
        }
    }

    /// The error for a failed read.
    pub fn unreadable(&self, source: io::Error) -> Error {
        Error::Read { what: self.what, path: self.path.clone(), source }
    }

    /// The error for contents that make no sense.
    pub fn damaged(&self, why: impl Into<String>) -> Error {
        Error::Damaged { path: self.path.clone(), why: why.into() }
    }

    /// The error for a file of the wrong kind.
    pub fn not(&self, found: Format, wanted: &'static str) -> Error {
        Error::Format { path: self.path.clone(), found: found.describe(), wanted }
    }

    /// The error for a file that does not fit.
    pub fn too_large(&self, needed: u64, room: u64) -> Error {
        Error::TooLarge { what: self.what, path: self.path.clone(), needed, room }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pieces: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (offset, bytes) in pieces {
            head[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn formats_are_told_by_their_magic() {
        for (head, format) in [
            (with(&[(0, b"\x7fELF"), (18, &[62, 0])]), Format::Elf { machine: EM_X86_64 }),
            (with(&[(0, b"\x7fELF"), (18, &[183, 0])]), Format::Elf { machine: EM_AARCH64 }),
            (b"\x7fELF".to_vec(), Format::Elf { machine: 0 }),
            (with(&[(0, b"MZ"), (0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")]), Format::BzImage),
            (with(&[(0, b"MZ"), (0x38, b"ARM\x64")]), Format::Arm64Image),
            (with(&[(0, &[0x1f, 0x8b, 8])]), Format::Gzip),
            (with(&[(0x202, b"HdrS")]), Format::Unknown),
            (b"#!/bin/sh\n".to_vec(), Format::Unknown),
            (vec![], Format::Unknown),
        ] {
            assert_eq!(Format::of(&head), format);
        }
    }

    #[test]
    fn a_missing_file_and_a_directory_are_named() {
        for path in ["/nonexistent/vmlinux", "/"] {
            let error = Image::open("kernel", Path::new(path)).unwrap_err().to_string();
            assert!(error.contains("kernel") && error.contains(path), "{error}");
        }
    }
}

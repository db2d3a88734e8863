//! The state's file: a fixed beginning, a header, a body.
//!
//! ```text
//! 0  magic, 8 bytes          12  length of the header     20  CRC-32 of the header
//! 8  epoch                   16  length of the body       24  CRC-32 of the body
//!                                                         28  CRC-32 of bytes 0 to 27
//! ```
//!
//! Numbers are 32 bits, little endian. Header and body follow, and nothing after them.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::{Ahead, Base, EPOCH, Error, Header, Layers, MachineState, ahead, layers, memory};
use crate::arch::native::Fingerprint;

/// The name of the state's file in a snapshot's directory.
pub const STATE_FILE: &str = "state";
/// The name of the memory's file.
pub const MEMORY_FILE: &str = "memory";
/// The name of what the memory lies over, if it does.
pub const BASE_FILE: &str = "base";

const MAGIC: [u8; 8] = *b"SUPRSNAP";
const BEGINNING: usize = 32;
const HEADER_MAX: u32 = 64 << 10;
/// Most of it are the files that a guest has open, some 100 bytes each, and what is in those that were removed: 64 MiB
/// a share at the most, and few machines have as much in more than one.
const BODY_MAX: u32 = 512 << 20;

/// Encodes the state's file.
pub fn write_state(mut out: impl Write, header: &Header, state: &MachineState) -> Result<u64, Error> {
    let unfit = |error: &dyn std::fmt::Display| Error::Unfit(error.to_string());
    let header = postcard::to_stdvec(header).map_err(|error| unfit(&error))?;
    let body = postcard::to_stdvec(state).map_err(|error| unfit(&error))?;
    for (bytes, max, what) in [(&header, HEADER_MAX, "header"), (&body, BODY_MAX, "state")] {
        if bytes.len() > max as usize {
            return Err(Error::Unfit(format!("its {what} of {} bytes has no room in {max}", bytes.len())));
        }
    }
    let all = sealed(&header, &body);
    out.write_all(&all).and_then(|()| out.flush()).map_err(|source| Error::File {
        what: "write",
        path: STATE_FILE.into(),
        source,
    })?;
    Ok(all.len() as u64)
}

/// A state's file with these parts, whatever is in them. None of them may be longer than 32 bits can say.
pub fn sealed(header: &[u8], body: &[u8]) -> Vec<u8> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let numbers = [EPOCH, len(header), len(body), crc32fast::hash(header), crc32fast::hash(body)];
    let mut beginning = MAGIC.to_vec();
    beginning.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    beginning.extend(crc32fast::hash(&beginning).to_le_bytes());
    [&beginning, header, body].concat()
}

/// The fixed beginning, checked.
struct Beginning {
    header: usize,
    body: usize,
    header_crc: u32,
    body_crc: u32,
}

/// A file that is being read, for errors.
struct Reading<'a>(&'a Path);

impl Reading<'_> {
    fn damaged(&self, why: impl Into<String>) -> Error {
        Error::Damaged { path: self.0.to_owned(), why: why.into() }
    }

    fn beginning(&self, bytes: &[u8], len: u64) -> Result<Beginning, Error> {
        let foreign = || Error::Foreign { path: self.0.to_owned() };
        let fixed: &[u8; BEGINNING] = bytes.first_chunk().ok_or_else(foreign)?;
        if fixed[..8] != MAGIC {
            return Err(foreign());
        }
        let number = |index: usize| {
            let at = 8 + 4 * index;
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]])
        };
        if crc32fast::hash(&fixed[..BEGINNING - 4]) != number(5) {
            return Err(self.damaged("the checksum of its beginning does not fit"));
        }
        if number(0) != EPOCH {
            return Err(Error::Epoch { path: self.0.to_owned(), found: number(0), wanted: EPOCH });
        }
        let (header, body) = (number(1), number(2));
        let whole = BEGINNING as u64 + u64::from(header) + u64::from(body);
        if header > HEADER_MAX || body > BODY_MAX || whole != len {
            return Err(self.damaged(format!("it has {len} bytes, and by its own account {whole}")));
        }
        Ok(Beginning {
            header: header as usize,
            body: body as usize,
            header_crc: number(3),
            body_crc: number(4),
        })
    }

    fn part<'a, T: serde::Deserialize<'a>>(&self, bytes: &'a [u8], crc: u32, what: &str) -> Result<T, Error> {
        if crc32fast::hash(bytes) != crc {
            return Err(self.damaged(format!("the checksum of its {what} does not fit")));
        }
        match postcard::take_from_bytes(bytes) {
            Ok((part, [])) => Ok(part),
            Ok((_, rest)) => Err(self.damaged(format!("{} bytes are left behind its {what}", rest.len()))),
            Err(error) => Err(self.damaged(format!("its {what} cannot be decoded: {error}"))),
        }
    }
}

fn open(path: &Path) -> Result<(File, u64), Error> {
    let failed = |source| Error::File { what: "open the snapshot", path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    Ok((file, len))
}

/// One that has to be so long.
fn open_of(path: &Path, wanted: u64) -> Result<File, Error> {
    match open(path)? {
        (file, len) if len == wanted => Ok(file),
        (_, len) => {
            let why = format!("it has {len} bytes instead of {wanted}");
            Err(Error::Damaged { path: path.to_owned(), why })
        }
    }
}

fn read(file: &mut File, path: &Path, len: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::with_capacity(len);
    file.take(len as u64).read_to_end(&mut bytes).map_err(|source| Error::File {
        what: "read the snapshot",
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes)
}

/// What the snapshot in `directory` says about itself.
pub fn read_header(directory: &Path) -> Result<Header, Error> {
    let path = directory.join(STATE_FILE);
    let (mut file, len) = open(&path)?;
    let reading = Reading(&path);
    let beginning = reading.beginning(&read(&mut file, &path, BEGINNING)?, len)?;
    let bytes = read(&mut file, &path, beginning.header)?;
    reading.part(&bytes, beginning.header_crc, "header")
}

/// A whole state's file, in memory; `path` is for errors.
pub fn read_state(path: &Path, bytes: &[u8]) -> Result<(Header, MachineState), Error> {
    let reading = Reading(path);
    let beginning = reading.beginning(bytes, bytes.len() as u64)?;
    // The lengths were compared with that of the whole.
    let (header, body) = bytes[BEGINNING..].split_at(beginning.header);
    let header: Header = reading.part(header, beginning.header_crc, "header")?;
    // The body of another architecture has other types.
    if header.architecture != std::env::consts::ARCH {
        let why = format!("it is from {}, and this is {}", header.architecture, std::env::consts::ARCH);
        return Err(Error::Host { path: path.to_owned(), why });
    }
    debug_assert_eq!(body.len(), beginning.body);
    Ok((header, reading.part(body, beginning.body_crc, "state")?))
}

/// A snapshot that was read and holds together, as far as can be told without reading its RAM.
#[derive(Debug)]
pub struct Snapshot {
    /// What it says about itself.
    pub header: Header,
    /// The machine.
    pub state: MachineState,
    /// Its RAM.
    pub memory: Layers,
    /// Where those who go on from it write first, if that is known.
    pub ahead: Option<Ahead>,
    path: PathBuf,
}

impl Snapshot {
    /// Reads the one in `directory`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(STATE_FILE);
        let (mut file, len) = open(&path)?;
        let reading = Reading(&path);
        // No more than it can have: what is longer is none.
        let most = u64::from(HEADER_MAX) + u64::from(BODY_MAX) + BEGINNING as u64;
        if len > most {
            reading.beginning(&read(&mut file, &path, BEGINNING)?, len)?;
        }
        let (header, state) = read_state(&path, &read(&mut file, &path, len as usize)?)?;
        let memory = open_of(&directory.join(MEMORY_FILE), header.memory_len)?;
        memory::check(&state.ram, header.memory_len).map_err(|why| reading.damaged(why))?;
        let id = header.lowest();
        layers::check(&state.parts, id.len).map_err(|why| reading.damaged(why))?;
        let parts = state.parts.clone();
        let memory = match (&header.base, &state.over) {
            (None, None) => Layers { base: memory, id, parts, over: None },
            (Some(base), Some(extents)) if base.len == header.memory_len => {
                layers::check(extents, base.len).map_err(|why| reading.damaged(why))?;
                let below = open_of(&directory.join(BASE_FILE), base.len)?;
                Layers { base: below, id, parts, over: Some((memory, extents.clone())) }
            }
            _ => return Err(reading.damaged("what its RAM lies over is not as long, or not there")),
        };
        let ahead = ahead::read(directory, header.memory_len);
        Ok(Self { header, state, memory, ahead, path })
    }

    /// Whether a host like `host` can go on with it.
    pub fn check_host(&self, hypervisor: &str, host: &Fingerprint) -> Result<(), Error> {
        let page_size = crate::memory::page_size();
        let other = |why| Error::Host { path: self.path.clone(), why };
        let header = &self.header;
        if header.hypervisor != hypervisor {
            return Err(other(format!("it is from {}, and this is {hypervisor}", header.hypervisor)));
        }
        if header.page_size != page_size {
            let theirs = header.page_size;
            return Err(other(format!(
                "it is from a host with pages of {theirs} bytes, and these have {page_size}"
            )));
        }
        let reading = Reading(&self.path);
        let theirs: Fingerprint = match postcard::take_from_bytes(&header.fingerprint) {
            Ok((fingerprint, [])) => fingerprint,
            _ => return Err(reading.damaged("what it says of its processor cannot be decoded")),
        };
        let missing = theirs.missing_on(host);
        if missing.is_empty() {
            return Ok(());
        }
        Err(other(format!(
            "this host's processor lacks {}; use a host like the one it is from",
            missing.join(", ")
        )))
    }

    /// A part of the state that has an encoding of its own.
    pub fn decode<'a, T: serde::Deserialize<'a>>(&self, bytes: &'a [u8], what: &str) -> Result<T, Error> {
        match postcard::take_from_bytes(bytes) {
            Ok((part, [])) => Ok(part),
            Ok(_) => Err(self.damaged(format!("bytes are left behind the state of {what}"))),
            Err(error) => Err(self.damaged(format!("the state of {what} cannot be decoded: {error}"))),
        }
    }

    /// An error about its content.
    pub(crate) fn damaged(&self, why: impl Into<String>) -> Error {
        Reading(&self.path).damaged(why)
    }
}

/// Reads all of the snapshot in `directory`, RAM too, and says what is wrong with it. `progress` hears how much of
/// the RAM's files is behind, and how much there is.
pub fn verify(directory: &Path, mut progress: impl FnMut(u64, u64)) -> Result<Header, Error> {
    let Snapshot { header, memory, .. } = Snapshot::open(directory)?;
    let own = Base { len: header.memory_len, data: header.memory_data, crc: header.memory_crc };
    let files = match &memory.over {
        None => vec![(MEMORY_FILE, &memory.base, &memory.parts, own)],
        Some((over, parts)) => {
            vec![(BASE_FILE, &memory.base, &memory.parts, memory.id), (MEMORY_FILE, over, parts, own)]
        }
    };
    let all: u64 = files.iter().map(|(.., id)| id.len).sum();
    let mut behind = 0;
    for (name, file, parts, id) in files {
        let path = directory.join(name);
        let summed = memory::checksum(file, parts, |done, _| progress(behind + done, all));
        let (data, crc) =
            summed.map_err(|source| Error::File { what: "read", path: path.clone(), source })?;
        if crc != id.crc {
            let why = format!(
                "the checksum of its {data} bytes does not fit that of the {} bytes that were written",
                id.data
            );
            return Err(Error::Damaged { path, why });
        }
        behind += id.len;
    }
    Ok(header)
}

//! Loading an ELF kernel into guest RAM, as far as PVH needs it: load segments at their physical
//! addresses, and the note that names the entry.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemory, ReadVolatile};

use super::layout;
use crate::memory::GuestRam;

/// What is wrong with an ELF kernel.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// Damaged or cut short: what does not fit.
    Damaged(String),
    /// It does not fit: where it ends, and where RAM ends.
    TooLarge {
        /// End of its memory.
        needed: u64,
        /// End of the guest's.
        room: u64,
    },
    /// It has no note with a PVH entry.
    NoPvh,
}

/// A kernel in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The 32-bit entry.
    pub entry: u64,
    /// The first address behind it, with its zeroed memory.
    pub end: u64,
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Notes of a kernel are some hundred bytes.
const NOTES_MAX: u64 = 64 * 1024;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

/// Loads the kernel that `file` holds.
pub fn load<F: Read + ReadVolatile + Seek>(ram: &GuestRam, file: &mut F) -> Result<Loaded, Error> {
    let segments = segments(file)?;
    let mut entry = None;
    let mut end = 0;
    for segment in &segments {
        match segment.kind {
            PT_LOAD if segment.in_memory > 0 => end = end.max(load_segment(ram, file, segment)?),
            PT_NOTE if entry.is_none() => entry = pvh_entry(&notes(file, segment)?),
            _ => {}
        }
    }
    let entry = entry.ok_or(Error::NoPvh)?;
    if !(layout::HIGH_START..end).contains(&entry) {
        return Err(damaged(format!("its entry {entry:#x} is outside of it")));
    }
    Ok(Loaded { entry, end })
}

fn damaged(why: impl Into<String>) -> Error {
    Error::Damaged(why.into())
}

fn read_at<F: Read + Seek>(file: &mut F, offset: u64, buffer: &mut [u8], what: &str) -> Result<(), Error> {
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| Read::read_exact(file, buffer))
        .map_err(|error| damaged(format!("{what} at {offset:#x}: {error}")))
}

/// A little endian number of at most 8 bytes in a buffer that is known to hold it.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn segments<F: Read + Seek>(file: &mut F) -> Result<Vec<Segment>, Error> {
    let mut header = [0; HEADER];
    read_at(file, 0, &mut header, "the ELF header")?;
    // Magic, 64 bits, little endian.
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(damaged("it is no 64-bit little endian ELF file"));
    }
    let offset = number::<8>(&header, 32);
    let (size, count) = (number::<2>(&header, 54) as usize, number::<2>(&header, 56) as usize);
    if size != PROGRAM_HEADER || count == 0 {
        return Err(damaged(format!("{count} program headers of {size} bytes")));
    }
    let mut table = vec![0; size * count];
    read_at(file, offset, &mut table, "the program headers")?;
    Ok(table
        .chunks_exact(size)
        .map(|header| Segment {
            kind: number::<4>(header, 0) as u32,
            offset: number::<8>(header, 8),
            address: number::<8>(header, 24),
            in_file: number::<8>(header, 32),
            in_memory: number::<8>(header, 40),
        })
        .collect())
}

fn load_segment<F: Read + ReadVolatile + Seek>(
    ram: &GuestRam,
    file: &mut F,
    segment: &Segment,
) -> Result<u64, Error> {
    let &Segment { offset, address, in_file, in_memory, .. } = segment;
    let end = address.checked_add(in_memory).filter(|_| in_file <= in_memory);
    let Some(end) = end.filter(|_| address >= layout::HIGH_START) else {
        return Err(damaged(format!("a segment of {in_file:#x} in {in_memory:#x} bytes at {address:#x}")));
    };
    let fits = usize::try_from(in_memory).is_ok_and(|len| ram.check_range(GuestAddress(address), len));
    if !fits {
        let room = layout::ram(crate::memory::size(ram)).first().map_or(0, |(base, len)| base + len);
        return Err(Error::TooLarge { needed: end, room });
    }
    file.seek(SeekFrom::Start(offset)).map_err(|error| damaged(error.to_string()))?;
    ram.read_exact_volatile_from(GuestAddress(address), file, in_file as usize).map_err(|error| {
        damaged(format!("a segment of {in_file:#x} bytes at offset {offset:#x}: {error}"))
    })?;
    Ok(end)
}

fn notes<F: Read + Seek>(file: &mut F, segment: &Segment) -> Result<Vec<u8>, Error> {
    if segment.in_file > NOTES_MAX {
        return Err(damaged(format!("notes of {} bytes", segment.in_file)));
    }
    let mut notes = vec![0; segment.in_file as usize];
    read_at(file, segment.offset, &mut notes, "the notes")?;
    Ok(notes)
}

/// Looks through notes, each a header of three words, a name and a description, both padded to words.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while let Some((header, rest)) = notes.split_at_checked(12) {
        let word = |index: usize| number::<4>(header, index * 4) as usize;
        let (name_len, len, kind) = (word(0), word(1), word(2) as u32);
        let (name, rest) = rest.split_at_checked(name_len.checked_next_multiple_of(4)?)?;
        let description = rest.get(..len)?;
        if name.get(..name_len) == Some(b"Xen\0") && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return match len {
                4 => Some(number::<4>(description, 0)),
                8 => Some(number::<8>(description, 0)),
                _ => None,
            };
        }
        // The last note may lack its padding.
        notes = rest.get(len.checked_next_multiple_of(4)?..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;

    fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, description.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, description] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    struct Builder {
        load: (u64, u64, u64),
        notes: Vec<u8>,
    }

    impl Default for Builder {
        fn default() -> Self {
            let mut notes = note(b"GNU\0", 3, &[1; 20]);
            notes.extend(note(b"Xen\0", 18, &0x10_0010u64.to_le_bytes()));
            Self { load: (MIB, 16, 4096), notes }
        }
    }

    impl Builder {
        fn build(&self) -> Vec<u8> {
            let mut file = vec![0; HEADER + 2 * PROGRAM_HEADER];
            let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
            put(0, b"\x7fELF\x02\x01");
            put(32, &64u64.to_le_bytes());
            put(54, &56u16.to_le_bytes());
            put(56, &2u16.to_le_bytes());
            let data = (HEADER + 2 * PROGRAM_HEADER) as u64;
            let (address, in_file, in_memory) = self.load;
            let notes = self.notes.len() as u64;
            for (index, kind, offset, address, in_file, in_memory) in
                [(0, PT_LOAD, data, address, in_file, in_memory), (1, PT_NOTE, data + 16, 0, notes, notes)]
            {
                let at = HEADER + index * PROGRAM_HEADER;
                put(at, &kind.to_le_bytes());
                for (field, value) in [(8, offset), (24, address), (32, in_file), (40, in_memory)] {
                    put(at + field, &value.to_le_bytes());
                }
            }
            file.extend_from_slice(b"kernel code here");
            file.extend_from_slice(&self.notes);
            file
        }
    }

    fn ram() -> GuestRam {
        memory::anonymous(&layout::ram(2 * MIB)).unwrap()
    }

    #[test]
    fn a_kernel_goes_to_its_physical_address() {
        let ram = ram();
        let loaded = load(&ram, &mut Cursor::new(Builder::default().build())).unwrap();
        assert_eq!(loaded, Loaded { entry: 0x10_0010, end: MIB + 4096 });
        let mut code = [0; 16];
        ram.read_slice(&mut code, GuestAddress(MIB)).unwrap();
        assert_eq!(&code, b"kernel code here");
    }

    #[test]
    fn what_is_wrong_is_told_apart() {
        let damaged = |result| matches!(result, Err(Error::Damaged(_)));
        let load = |builder: Builder| load(&ram(), &mut Cursor::new(builder.build()));
        let with = |load| Builder { load, ..Builder::default() };
        assert_eq!(load(Builder { notes: vec![], ..Builder::default() }), Err(Error::NoPvh));
        assert_eq!(
            load(Builder { notes: note(b"Xen\0", 6, b"guest"), ..Builder::default() }),
            Err(Error::NoPvh)
        );
        assert_eq!(load(with((MIB, 16, 3 * MIB))), Err(Error::TooLarge { needed: 4 * MIB, room: 2 * MIB }));
        assert!(damaged(load(with((0x1000, 16, 16)))), "into our own structures");
        assert!(damaged(load(with((u64::MAX - 8, 16, 16)))), "around the end");
        assert!(damaged(load(with((MIB, 17, 16)))), "more in the file than in memory");
        assert!(damaged(load(with((MIB, 4000, 4096)))), "more than the file has");
        assert!(damaged(load(with((MIB, 4, 8)))), "the entry is outside");
    }

    #[test]
    fn notes_are_walked_to_the_one_wanted() {
        let entry = note(b"Xen\0", 18, &7u32.to_le_bytes());
        assert_eq!(pvh_entry(&entry), Some(7));
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, b"abc")), None);
        assert_eq!(pvh_entry(&[note(b"odd", 1, b"12345"), entry].concat()), Some(7));
        assert_eq!(pvh_entry(&[0xff; 40]), None);
    }

    proptest! {
        #[test]
        fn no_file_upsets_it(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), cut: prop::sample::Index) {
            let mut file = Builder::default().build();
            for (at, byte) in changes {
                let at = at.index(file.len());
                file[at] = byte;
            }
            file.truncate(cut.index(file.len()) + 1);
            let _ = load(&ram(), &mut Cursor::new(file));
        }

        #[test]
        fn no_notes_upset_it(notes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = pvh_entry(&notes);
        }
    }
}

//! The arm64 kernel Image (Linux `Documentation/arch/arm64/booting.rst`): the header says where in
//! memory the kernel wants to be and how much it takes there.

use std::io::Read;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::layout::{FDT_MAX, RAM_BASE};
use crate::kernel::{Error, Format, Image};
use crate::memory::GuestRam;

/// What this machine boots, for messages.
const WANTED: &str = "an uncompressed Image for arm64, or one compressed by gzip";
/// Where kernels go whose header does not say, which are those before Linux 3.17.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;
const HEADER: usize = 64;
const FLAG_BIG_ENDIAN: u64 = 1 << 0;
/// Larger kernels are not.
const KERNEL_MAX: u64 = 1 << 30;

/// A range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// The address behind the last.
    pub end: u64,
}

/// A kernel in guest RAM, with its initrd and the room for the device tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The kernel, which starts at its first byte.
    pub kernel: Range,
    /// The initrd.
    pub initrd: Option<Range>,
    /// Where the device tree goes.
    pub fdt: u64,
}

/// The kernel's place by its header: start, and size in memory.
fn place(header: &[u8; HEADER], file_len: u64) -> Result<(u64, u64), String> {
    let word =
        |at: usize| header[at..at + 8].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let (text_offset, image_size, flags) = (word(8), word(16), word(24));
    if flags & FLAG_BIG_ENDIAN != 0 {
        return Err("it is for a big endian processor".into());
    }
    if image_size == 0 {
        return Ok((RAM_BASE + OLD_TEXT_OFFSET, file_len));
    }
    // A kernel may ask to be up to 2 MiB above a boundary of 2 MiB.
    if text_offset >= 1 << 21 || image_size < file_len || image_size > KERNEL_MAX {
        return Err(format!("its header wants {image_size:#x} bytes at offset {text_offset:#x}"));
    }
    Ok((RAM_BASE + text_offset, image_size))
}

/// Where the file's last section ends, by the PE header that kernels with an EFI stub have: the Image's
/// own header counts memory that is not in the file, so only this tells a file that was cut short.
fn pe_end(head: &[u8]) -> Option<u64> {
    const SECTION: usize = 40;
    let number = |at: usize, len: usize| {
        let bytes = head.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let pe = number(0x3c, 4)?;
    if head.get(pe..pe.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    let (sections, optional) = (number(pe + 6, 2)?, number(pe + 20, 2)?);
    let table = pe + 24 + optional;
    (0..sections)
        .map(|index| {
            let section = table + index * SECTION;
            Some(number(section + 16, 4)? as u64 + number(section + 20, 4)? as u64)
        })
        .try_fold(0, |end, section| Some(end.max(section?)))
}

/// Loads the files. Needs nothing of the machine but its memory.
pub fn load(ram: &GuestRam, mut kernel: Image, initrd: Option<Image>) -> Result<Loaded, Error> {
    let head = kernel.head()?;
    let kernel_range = match Format::of(&head) {
        Format::Arm64Image => load_plain(ram, &head, &mut kernel)?,
        Format::Gzip => load_gzip(ram, &mut kernel)?,
        other => return Err(kernel.not(other, WANTED)),
    };
    let end = ram.last_addr().raw_value() + 1;
    let room = end.saturating_sub(kernel_range.end);
    // The device tree at the very top, the initrd below it.
    let fdt = (end - FDT_MAX.min(end)) & !(FDT_MAX - 1);
    if fdt < kernel_range.end {
        return Err(kernel.too_large(kernel_range.end + FDT_MAX - RAM_BASE, end - RAM_BASE));
    }
    let initrd = match initrd {
        None => None,
        Some(mut initrd) => {
            let len = initrd.len;
            let start = fdt.checked_sub(len).map(|start| start & !0xfff);
            let Some(start) = start.filter(|start| *start >= kernel_range.end) else {
                return Err(initrd.too_large(len, room.saturating_sub(FDT_MAX)));
            };
            ram.read_exact_volatile_from(GuestAddress(start), &mut initrd.file, len as usize)
                .map_err(|error| initrd.unreadable(std::io::Error::other(error)))?;
            Some(Range { start, end: start + len })
        }
    };
    Ok(Loaded { kernel: kernel_range, initrd, fdt })
}

fn check(ram: &GuestRam, head: &[u8], len: u64, kernel: &Image) -> Result<Range, Error> {
    let header = head.first_chunk().ok_or_else(|| kernel.damaged("its header is not all there"))?;
    if let Some(end) = pe_end(head).filter(|end| *end > len) {
        return Err(kernel.damaged(format!("it has {len} bytes of {end}")));
    }
    let (start, size) = place(header, len).map_err(|why| kernel.damaged(why))?;
    let end = ram.last_addr().raw_value() + 1;
    if start + size > end {
        return Err(kernel.too_large(start + size - RAM_BASE, end - RAM_BASE));
    }
    Ok(Range { start, end: start + size })
}

fn load_plain(ram: &GuestRam, head: &[u8], kernel: &mut Image) -> Result<Range, Error> {
    let range = check(ram, head, kernel.len, kernel)?;
    ram.read_exact_volatile_from(GuestAddress(range.start), &mut kernel.file, kernel.len as usize)
        .map_err(|error| kernel.unreadable(std::io::Error::other(error)))?;
    Ok(range)
}

fn load_gzip(ram: &GuestRam, kernel: &mut Image) -> Result<Range, Error> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&kernel.file)
        .take(KERNEL_MAX)
        .read_to_end(&mut bytes)
        .map_err(|error| kernel.damaged(format!("it does not decompress: {error}")))?;
    match Format::of(&bytes) {
        Format::Arm64Image => {}
        other => return Err(kernel.not(other, WANTED)),
    }
    let range = check(ram, &bytes, bytes.len() as u64, kernel)?;
    ram.write_slice(&bytes, GuestAddress(range.start))
        .map_err(|error| kernel.unreadable(std::io::Error::other(error)))?;
    Ok(range)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;

    fn header(text_offset: u64, image_size: u64, flags: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        for (at, word) in [(8, text_offset), (16, image_size), (24, flags)] {
            header[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        header[0x38..0x3c].copy_from_slice(b"ARM\x64");
        header
    }

    #[test]
    fn the_header_says_where_the_kernel_goes() {
        for (header, len, expected) in [
            (header(0, 3 * MIB, 0xa), 2 * MIB, Some((RAM_BASE, 3 * MIB))),
            (header(0x8_0000, 3 * MIB, 0xa), 2 * MIB, Some((RAM_BASE + 0x8_0000, 3 * MIB))),
            (header(0, 0, 0), 2 * MIB, Some((RAM_BASE + OLD_TEXT_OFFSET, 2 * MIB))),
            (header(0, 3 * MIB, 1), 2 * MIB, None),
            (header(0, MIB, 0), 2 * MIB, None),
            (header(u64::MAX, 3 * MIB, 0), 2 * MIB, None),
            (header(0, u64::MAX, 0), 2 * MIB, None),
        ] {
            assert_eq!(place(&header, len).ok(), expected);
        }
    }

    #[test]
    fn a_file_cut_short_is_told_by_its_sections() {
        let mut head = header(0, 3 * MIB, 0xa).to_vec();
        head.resize(512, 0);
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x3c, &64u32.to_le_bytes());
        put(64, b"PE\0\0");
        put(64 + 6, &2u16.to_le_bytes());
        put(64 + 20, &16u16.to_le_bytes());
        for (index, (size, offset)) in [(1000u32, 4096u32), (500, 8192)].into_iter().enumerate() {
            put(64 + 24 + 16 + index * 40 + 16, &size.to_le_bytes());
            put(64 + 24 + 16 + index * 40 + 20, &offset.to_le_bytes());
        }
        assert_eq!(pe_end(&head), Some(8692));
        assert_eq!(pe_end(&head[..160]), None, "the section table is cut itself");
        head[0x3f] = 0xff;
        assert_eq!(pe_end(&head), None);

        let ram = memory::anonymous(&[(RAM_BASE, 16 * MIB)]).unwrap();
        head[0x3f] = 0;
        let file = Scratch::new("cut", &head);
        let error = load(&ram, file.open("kernel"), None).unwrap_err();
        assert!(error.to_string().contains("512 bytes of 8692"), "{error}");
    }

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("vmm-image-{}-{name}", std::process::id()));
            fs::write(&path, bytes).unwrap();
            Self(path)
        }
        fn open(&self, what: &'static str) -> Image {
            Image::open(what, &self.0).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn kernel_initrd_and_tree_do_not_meet() {
        let mut bytes = header(0, 3 * MIB, 0xa).to_vec();
        bytes.resize(MIB as usize, 7);
        let kernel = Scratch::new("kernel", &bytes);
        let initrd = Scratch::new("initrd", &[9; 5000]);
        let ram = memory::anonymous(&[(RAM_BASE, 16 * MIB)]).unwrap();
        let loaded = load(&ram, kernel.open("kernel"), Some(initrd.open("initrd"))).unwrap();
        assert_eq!(loaded.kernel, Range { start: RAM_BASE, end: RAM_BASE + 3 * MIB });
        assert_eq!(loaded.fdt, RAM_BASE + 14 * MIB);
        let initrd_range = loaded.initrd.unwrap();
        assert_eq!(
            initrd_range,
            Range { start: RAM_BASE + 14 * MIB - 8192, end: RAM_BASE + 14 * MIB - 8192 + 5000 }
        );
        assert_eq!(ram.read_obj::<u8>(GuestAddress(initrd_range.end - 1)).unwrap(), 9);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(RAM_BASE + MIB - 1)).unwrap(), 7);

        for (size, what) in [(2, "kernel"), (4, "kernel"), (6, "initrd")] {
            let big = Scratch::new("big-initrd", &vec![0; 2 * MIB as usize]);
            let ram = memory::anonymous(&[(RAM_BASE, size * MIB)]).unwrap();
            let error = load(&ram, kernel.open("kernel"), Some(big.open("initrd"))).unwrap_err();
            assert!(matches!(&error, Error::TooLarge { what: found, .. } if *found == what), "{error}");
        }
    }

    #[test]
    fn gzip_is_looked_into() {
        use std::io::Write;
        let mut bytes = header(0, 3 * MIB, 0xa).to_vec();
        bytes.resize(5000, 7);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&bytes).unwrap();
        let gzip = gzip.finish().unwrap();
        let ram = memory::anonymous(&[(RAM_BASE, 16 * MIB)]).unwrap();
        let whole = Scratch::new("gz", &gzip);
        assert_eq!(load(&ram, whole.open("kernel"), None).unwrap().kernel.end, RAM_BASE + 3 * MIB);
        let cut = Scratch::new("gz-cut", &gzip[..gzip.len() / 2]);
        assert!(matches!(load(&ram, cut.open("kernel"), None), Err(Error::Damaged { .. })));
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let ram = memory::anonymous(&[(RAM_BASE, 16 * MIB)]).unwrap();
        let mut elf = b"\x7fELF".to_vec();
        elf.resize(64, 0);
        elf[18] = 62;
        let file = Scratch::new("elf", &elf);
        let error = load(&ram, file.open("kernel"), None).unwrap_err().to_string();
        assert!(error.contains("ELF file for x86_64") && error.contains("arm64"), "{error}");
    }
}

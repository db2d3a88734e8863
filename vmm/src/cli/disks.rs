//! `--block` and `--drive`: disks, and drives into which disks are put.

use std::path::PathBuf;

use vmm::devices::virtio::Device;
use vmm::devices::virtio::block::{self, Block, Drive, Medium, Rings, SERIAL_MAX};
use vmm::slots::SlotId;

/// So many disks in drives have their requests served many at a time; of more, each has them served one by one.
const RINGS: usize = 2;

/// The drives of a machine, on their way to their slots.
#[derive(Default)]
pub(super) struct Drives {
    blocks: Vec<Block>,
    slots: Vec<(String, Drive)>,
}

impl Drives {
    /// Opens the disks that are in them.
    pub(super) fn open(disks: &[Option<Disk>]) -> Result<Self, block::Error> {
        let rings = Rings::new(disks.len().min(RINGS));
        let mut drives = Self::default();
        for (index, disk) in disks.iter().enumerate() {
            let block = Block::drive(disk.as_ref().map(Disk::medium).transpose()?, &rings);
            drives.slots.extend(block.slot().map(|slot| (format!("drive.{index}"), slot)));
            drives.blocks.push(block);
        }
        Ok(drives)
    }

    /// Gives the devices slots, once.
    pub(super) fn add_to(&mut self, slots: &mut Vec<(SlotId, Box<dyn Device>)>) {
        for ((name, _), block) in self.slots.iter().zip(self.blocks.drain(..)) {
            slots.push((SlotId::new(name), Box::new(block)));
        }
    }

    /// What disks are put into them by.
    pub(super) fn slots(self) -> Vec<(String, Drive)> {
        self.slots
    }
}

/// A disk with a raw image, or with a disk of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    pub(super) serial: Option<String>,
}

impl Disk {
    /// Of a drive, which may have none.
    pub(super) fn parse_in_drive(text: &str) -> Result<Option<Self>, String> {
        if text == "none" { Ok(None) } else { Self::parse(text).map(Some) }
    }

    /// Options are taken from the end, each of them once: whoever gives both can have any name before them, also one
    /// that looks like an option.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (mut rest, mut read_only, mut serial) = (text, None, None);
        while let Some((before, option)) = rest.rsplit_once(':') {
            match (option, option.strip_prefix("serial=")) {
                ("ro" | "rw", _) if read_only.is_none() => read_only = Some(option == "ro"),
                (_, Some(given)) if serial.is_none() => serial = Some(self::serial(given)?),
                _ => break,
            }
            rest = before;
        }
        if rest.is_empty() {
            return Err(format!("{text} is no disk: give FILE, and behind it :ro or :serial=ID"));
        }
        Ok(Self { path: rest.into(), read_only: read_only.unwrap_or(false), serial })
    }

    /// Opens it.
    pub(super) fn medium(&self) -> Result<Medium, block::Error> {
        let medium = Medium::of(block::open(&self.path, self.read_only)?, &self.path, self.read_only)?;
        Ok(match &self.serial {
            Some(serial) => medium.named(serial),
            None => medium,
        })
    }

    /// What a guest is told of it: without a serial number as much of its name as fits.
    pub(super) fn name(&self) -> String {
        if let Some(serial) = &self.serial {
            return serial.clone();
        }
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let fits = |(at, char): &(usize, char)| at + char.len_utf8() <= SERIAL_MAX;
        name.char_indices().take_while(fits).map(|(_, char)| char).collect()
    }
}

/// What fits the answer to a driver's question, and needs no quotes in a guest's files.
fn serial(text: &str) -> Result<String, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if text.is_empty() || text.len() > SERIAL_MAX || !text.bytes().all(good) {
        return Err(format!(
            "{text:?} is no serial number: give 1 to {SERIAL_MAX} letters, digits, dots, dashes or underscores"
        ));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let disk = |path: &str, read_only, serial: Option<&str>| {
            Some(Disk { path: path.into(), read_only, serial: serial.map(str::to_owned) })
        };
        for (text, expected) in [
            ("/a.img", disk("/a.img", false, None)),
            ("/a.img:ro", disk("/a.img", true, None)),
            ("/a.img:rw", disk("/a.img", false, None)),
            ("/a.img:serial=c0b0", disk("/a.img", false, Some("c0b0"))),
            ("/a.img:serial=c0b0:ro", disk("/a.img", true, Some("c0b0"))),
            ("/a.img:ro:serial=c0b0", disk("/a.img", true, Some("c0b0"))),
            ("/a:b=c, d\n:e", disk("/a:b=c, d\n:e", false, None)),
            ("/a:ro:serial=x:serial=c0b0:rw", disk("/a:ro:serial=x", false, Some("c0b0"))),
            ("/a:serial=x:ro:ro:serial=c0b0", disk("/a:serial=x:ro", true, Some("c0b0"))),
            ("/a:serial=12345678901234567890", disk("/a", false, Some("12345678901234567890"))),
            ("/a:serial=123456789012345678901", None),
            ("/a:serial=", None),
            ("/a:serial=a b", None),
            ("", None),
            (":ro", None),
            (":serial=c0b0:rw", None),
        ] {
            assert_eq!(Disk::parse(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_drive_may_be_empty() {
        assert_eq!(Disk::parse_in_drive("none"), Ok(None));
        assert!(matches!(Disk::parse_in_drive("none:ro"), Ok(Some(Disk { read_only: true, .. }))));
    }

    #[test]
    fn what_a_guest_is_told_of_a_disk() {
        for (text, name) in [
            ("/d/a.img", "a.img"),
            ("/d/a.img:serial=b", "b"),
            ("/d/a-name-of-more-than-twenty", "a-name-of-more-than-"),
            ("/d/a-name-of-nineteen-\u{e9}", "a-name-of-nineteen-"),
        ] {
            assert_eq!(Disk::parse(text).unwrap().name(), name, "{text}");
        }
    }
}

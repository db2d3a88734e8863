//! What a request does to the image.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtio_queue::{Reader, Writer};

use super::super::queue::Chain;
use super::super::{Broken, Serve};
use crate::memory::RamSlice;

/// The unit of all positions, whatever the disk's blocks are.
pub const SECTOR: u64 = 512;
/// Ranges of one discard or of one writing of zeroes.
pub const RANGES_MAX: u32 = 32;
/// Sectors of one such range.
pub const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// Data of one request. Drivers stay far below; without a bound a request could take for ever.
const DATA_MAX: u64 = 64 << 20;
const BUFFER: usize = 256 * 1024;
const HEADER: usize = 16;
const RANGE: usize = 16;
const ID: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const RANGE_UNMAP: u32 = 1;

/// Why a request failed, as far as the guest is told.
#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn invalid(why: &'static str) -> Failure {
    Failure::Io(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// The image while the device is active.
#[derive(Debug)]
pub struct Disk {
    file: Arc<File>,
    len: u64,
    read_only: bool,
    id: [u8; ID],
    buffer: Vec<u8>,
}

impl Disk {
    /// Of `len` bytes. The id is cut to what the guest can be told.
    pub fn new(file: Arc<File>, len: u64, read_only: bool, name: &str) -> Self {
        let mut id = [0; ID];
        for (to, from) in id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self { file, len, read_only, id, buffer: vec![0; BUFFER] }
    }

    /// Where a transfer begins, if all of it is on the disk.
    fn range(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let start = sector.checked_mul(SECTOR);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.len => Ok(start),
            _ => Err(invalid("beyond the end of the disk")),
        }
    }

    fn transfer(&self, sector: u64, bytes: usize) -> Result<u64, Failure> {
        let bytes = bytes as u64;
        if !bytes.is_multiple_of(SECTOR) || bytes > DATA_MAX {
            return Err(invalid("not a reasonable number of sectors"));
        }
        self.range(sector, bytes)
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.read_only { Err(invalid("the disk is read-only")) } else { Ok(()) }
    }

    fn read(&mut self, sector: u64, writer: &mut Writer<'_, RamSlice<'_>>) -> Result<(), Failure> {
        let mut left = writer.available_bytes();
        let mut at = self.transfer(sector, left)?;
        while left > 0 {
            let buffer = &mut self.buffer[..left.min(BUFFER)];
            self.file.read_exact_at(buffer, at)?;
            writer.write_all(buffer)?;
            at += buffer.len() as u64;
            left -= buffer.len();
        }
        Ok(())
    }

    fn write(&mut self, sector: u64, reader: &mut Reader<'_, RamSlice<'_>>) -> Result<(), Failure> {
        self.writable()?;
        let mut left = reader.available_bytes();
        let mut at = self.transfer(sector, left)?;
        while left > 0 {
            let buffer = &mut self.buffer[..left.min(BUFFER)];
            reader.read_exact(buffer)?;
            self.file.write_all_at(buffer, at)?;
            at += buffer.len() as u64;
            left -= buffer.len();
        }
        Ok(())
    }

    /// Discards, or writes zeroes to, all ranges of a request.
    fn ranges(&self, zeroes: bool, reader: &mut Reader<'_, RamSlice<'_>>) -> Result<(), Failure> {
        self.writable()?;
        let bytes = reader.available_bytes();
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes / RANGE > RANGES_MAX as usize {
            return Err(invalid("not a reasonable number of ranges"));
        }
        for _ in 0..bytes / RANGE {
            let sector: u64 = reader.read_obj()?;
            let sectors: u32 = reader.read_obj()?;
            let flags: u32 = reader.read_obj()?;
            if flags & !(if zeroes { RANGE_UNMAP } else { 0 }) != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > RANGE_SECTORS_MAX {
                return Err(invalid("a range of too many sectors"));
            }
            let bytes = u64::from(sectors) * SECTOR;
            let at = self.range(sector, bytes)?;
            if bytes > 0 {
                deallocate(&self.file, at, bytes, !zeroes || flags & RANGE_UNMAP != 0)?;
            }
        }
        Ok(())
    }

    fn execute(
        &mut self,
        reader: &mut Reader<'_, RamSlice<'_>>,
        data: &mut Writer<'_, RamSlice<'_>>,
    ) -> Result<(), Failure> {
        let kind: u32 = reader.read_obj()?;
        let _reserved: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        match kind {
            T_IN => self.read(sector, data),
            T_OUT => self.write(sector, reader),
            T_FLUSH if self.read_only => Ok(()),
            T_FLUSH => Ok(self.file.sync_data()?),
            T_GET_ID => {
                let len = data.available_bytes().min(ID);
                Ok(data.write_all(&self.id[..len])?)
            }
            T_DISCARD => self.ranges(false, reader),
            T_WRITE_ZEROES => self.ranges(true, reader),
            _ => Err(Failure::Unsupported),
        }
    }
}

/// Makes a range read as zeroes, and gives its blocks back to the host where that is allowed.
#[cfg(target_os = "linux")]
fn deallocate(file: &File, at: u64, len: u64, unmap: bool) -> Result<(), Failure> {
    use nix::errno::Errno;
    use nix::fcntl::{FallocateFlags, fallocate};

    let mode =
        if unmap { FallocateFlags::FALLOC_FL_PUNCH_HOLE } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
    // Both are below the file's length, which fits.
    let (at, len) = (at.cast_signed(), len.cast_signed());
    match fallocate(file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, at, len) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Err(Failure::Unsupported),
        Err(error) => Err(Failure::Io(error.into())),
    }
}

/// Not offered to the guest elsewhere.
#[cfg(not(target_os = "linux"))]
fn deallocate(_file: &File, _at: u64, _len: u64, _unmap: bool) -> Result<(), Failure> {
    Err(Failure::Unsupported)
}

impl Serve for Disk {
    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        let ram = chain.memory().clone();
        let mut reader: Reader<'_, RamSlice<'_>> = chain.clone().reader(&ram)?;
        let mut data: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
        if reader.available_bytes() < HEADER {
            return Err(Broken("a block request without a header".into()));
        }
        // The last byte that the device may write is the status.
        let at = data.available_bytes().checked_sub(1);
        let at = at.ok_or_else(|| Broken("a block request without room for its status".into()))?;
        let mut status = data.split_at(at).map_err(|error| Broken(error.to_string()))?;
        let code = match self.execute(&mut reader, &mut data) {
            Ok(()) => S_OK,
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Io(error)) => {
                log::debug!("block: {error}");
                S_IOERR
            }
        };
        status.write_all(&[code]).map_err(|error| Broken(error.to_string()))?;
        Ok(u32::try_from(data.bytes_written() + 1).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests;

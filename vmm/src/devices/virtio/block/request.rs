//! What a request does to the image.

use std::fs::File;
use std::io::{self, Read, Write};
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use virtio_queue::{Reader, Writer};

use super::super::limit::Limiter;
use super::super::queue::Chain;
#[cfg(target_os = "linux")]
use super::super::scatter::{Part, Scatter};
use super::super::{Broken, Serve};
use super::counters::Counters;
use super::medium::Medium;
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
/// Bytes of what the device says it is called.
pub const ID: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Status of a request that was done.
pub const S_OK: u8 = 0;
/// Status of a request that failed.
pub const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const RANGE_UNMAP: u32 = 1;

/// What was done.
enum Done {
    Read,
    Wrote,
    Other,
}

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

/// The image while the device is active, or none, of which nothing can be read.
#[derive(Debug)]
pub struct Disk {
    file: Option<Arc<File>>,
    len: u64,
    read_only: bool,
    id: [u8; ID],
    limiter: Limiter,
    counters: Arc<Counters>,
    buffer: Vec<u8>,
}

/// What a request is about.
#[cfg(target_os = "linux")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk.
    Write,
    /// All that was written is to stay.
    Flush,
}

/// A request that is in order, taken apart.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub struct Transfer {
    /// What it is about.
    pub kind: Kind,
    /// Where it begins, in bytes.
    pub at: u64,
    /// Bytes of its data.
    pub len: u32,
    /// Its data.
    pub scatter: Scatter,
    /// Where its status goes, guest-physical.
    pub status: u64,
}

impl Disk {
    /// With this in its drive. The id is cut to what the guest can be told.
    pub fn new(medium: Option<&Medium>, limiter: Limiter, counters: Arc<Counters>) -> Self {
        let mut id = [0; ID];
        for (to, from) in id.iter_mut().zip(medium.map_or("", |medium| &medium.id).bytes()) {
            *to = from;
        }
        Self {
            file: medium.map(|medium| Arc::clone(&medium.file)),
            len: medium.map_or(0, |medium| medium.len),
            read_only: medium.is_none_or(|medium| medium.read_only),
            id,
            limiter,
            counters,
            buffer: vec![0; BUFFER],
        }
    }

    /// Takes a request apart if it is a transfer in order, or a flush. Everything else gets the list
    /// back, and an answer by [`Serve::serve`].
    #[cfg(target_os = "linux")]
    pub fn plan(&self, chain: &Chain, mut scatter: Scatter) -> Result<Transfer, Scatter> {
        let Some((kind, at, status)) = self.try_plan(chain, &mut scatter) else {
            scatter.clear();
            return Err(scatter);
        };
        // Not more than DATA_MAX.
        let len = if kind == Kind::Flush { 0 } else { scatter.bytes() as u32 };
        Ok(Transfer { kind, at, len, scatter, status })
    }

    #[cfg(target_os = "linux")]
    fn try_plan(&self, chain: &Chain, scatter: &mut Scatter) -> Option<(Kind, u64, u64)> {
        let ram = chain.memory();
        let mut reader: Reader<'_, RamSlice<'_>> = chain.clone().reader(ram).ok()?;
        let code: u32 = reader.read_obj().ok()?;
        let _reserved: u32 = reader.read_obj().ok()?;
        let sector: u64 = reader.read_obj().ok()?;
        let last = chain.clone().writable().filter(|part| part.len() > 0).last()?;
        let status = last.addr().0.checked_add(u64::from(last.len()) - 1)?;
        let (kind, part) = match code {
            T_IN => (Kind::Read, Part::Writable),
            T_OUT => (Kind::Write, Part::Readable),
            T_FLUSH if !self.read_only => return Some((Kind::Flush, 0, status)),
            _ => return None,
        };
        scatter.add(chain.clone(), part).ok()?;
        match kind {
            Kind::Read => scatter.trim_back(1),
            _ => scatter.trim_front(HEADER),
        }
        if kind == Kind::Write {
            self.writable().ok()?;
        }
        let bytes = usize::try_from(scatter.bytes()).ok().filter(|bytes| *bytes > 0)?;
        let at = self.transfer(sector, bytes).ok()?;
        Some((kind, at, status))
    }

    /// The image's descriptor. Nothing is [planned](Self::plan) where there is none.
    #[cfg(target_os = "linux")]
    pub fn fd(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Counts what was done elsewhere.
    #[cfg(target_os = "linux")]
    pub fn count(&self, kind: Kind, len: u32) {
        match kind {
            Kind::Read => self.counters.read(len.into()),
            Kind::Write => self.counters.wrote(len.into()),
            Kind::Flush => self.counters.other(),
        }
    }

    /// Counts what failed elsewhere.
    #[cfg(target_os = "linux")]
    pub fn count_failure(&self) {
        self.counters.failed();
    }

    /// Charges what will be done elsewhere.
    #[cfg(target_os = "linux")]
    pub fn charge(&self, transfer: &Transfer) {
        self.limiter.charge(transfer.len.into());
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

    fn file(&self) -> Result<Arc<File>, Failure> {
        self.file.clone().ok_or_else(|| invalid("there is no disk in the drive"))
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
        let file = self.file()?;
        while left > 0 {
            let buffer = &mut self.buffer[..left.min(BUFFER)];
            file.read_exact_at(buffer, at)?;
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
        let file = self.file()?;
        while left > 0 {
            let buffer = &mut self.buffer[..left.min(BUFFER)];
            reader.read_exact(buffer)?;
            file.write_all_at(buffer, at)?;
            at += buffer.len() as u64;
            left -= buffer.len();
        }
        Ok(())
    }

    /// Discards, or writes zeroes to, all ranges of a request.
    fn ranges(&self, zeroes: bool, reader: &mut Reader<'_, RamSlice<'_>>) -> Result<(), Failure> {
        self.writable()?;
        let file = self.file()?;
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
                deallocate(&file, at, bytes, !zeroes || flags & RANGE_UNMAP != 0)?;
            }
        }
        Ok(())
    }

    fn execute(
        &mut self,
        reader: &mut Reader<'_, RamSlice<'_>>,
        data: &mut Writer<'_, RamSlice<'_>>,
    ) -> Result<Done, Failure> {
        let kind: u32 = reader.read_obj()?;
        let _reserved: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        match kind {
            T_IN => return self.read(sector, data).map(|()| Done::Read),
            T_OUT => return self.write(sector, reader).map(|()| Done::Wrote),
            T_FLUSH if self.read_only => {}
            T_FLUSH => self.file()?.sync_data()?,
            T_GET_ID => {
                let len = data.available_bytes().min(ID);
                data.write_all(&self.id[..len])?;
            }
            T_DISCARD => self.ranges(false, reader)?,
            T_WRITE_ZEROES => self.ranges(true, reader)?,
            _ => return Err(Failure::Unsupported),
        }
        Ok(Done::Other)
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
    fn wait(&mut self) -> Option<Duration> {
        self.limiter.wait()
    }

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
        let (incoming, room) = (reader.available_bytes() - HEADER, data.available_bytes());
        self.limiter.charge((incoming + room) as u64);
        let executed = self.execute(&mut reader, &mut data);
        match &executed {
            Ok(Done::Read) => self.counters.read(room as u64),
            Ok(Done::Wrote) => self.counters.wrote(incoming as u64),
            Ok(Done::Other) => self.counters.other(),
            Err(_) => self.counters.failed(),
        }
        let code = match executed {
            Ok(_) => S_OK,
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

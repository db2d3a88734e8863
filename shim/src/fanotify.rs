//! What happens to files of the host (fanotify(7)), with the names, and with who has done it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// How a file is found again, whatever its name is (`struct file_handle`). Those of two file systems may be the same, if it is by
/// chance.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Handle {
    kind: i32,
    bytes: Vec<u8>,
}

/// What has happened.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// `FAN_*`, of all that has happened to it since it was told of last.
    pub mask: u64,
    /// The process that has done it.
    pub pid: u32,
    /// In which directory, and to which name in it; `.` for the directory itself.
    pub name: Option<(Handle, Vec<u8>)>,
    /// The file itself, where it is still there.
    pub itself: Option<Handle>,
}

/// What is told of a directory.
pub const OF_DIRECTORY: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_EVENT_ON_CHILD
    | libc::FAN_ONDIR
    | OF_FILE;
/// What is told of a file.
pub const OF_FILE: u64 =
    libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE | libc::FAN_ATTRIB | libc::FAN_DELETE_SELF | libc::FAN_MOVE_SELF;

/// What is heard of is read in so large pieces; the longest that is told of one thing is less than a tenth.
const BUFFER: usize = 16 << 10;
const METADATA: usize = 24;
/// Of a piece of information: its type, its length, and the file system's number.
const INFORMATION: usize = 12;

/// Those of which one is told.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Group {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Group {
    /// An empty one, which does not block.
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DFID_NAME;
        let how = (libc::O_RDONLY | libc::O_CLOEXEC).cast_unsigned();
        // SAFETY: the call takes two numbers.
        let fd = Errno::result(unsafe { libc::fanotify_init(flags, how) })?;
        // SAFETY: the kernel has just made it, and nobody else knows its number.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Tells of a file, too, that is open in any way.
    pub fn add(&self, file: impl AsFd, what: u64) -> io::Result<()> {
        let path = path_of(file.as_fd())?;
        // SAFETY: besides numbers the kernel reads the path, which ends with a zero and outlives the call.
        let done = unsafe {
            libc::fanotify_mark(self.0.as_raw_fd(), libc::FAN_MARK_ADD, what, libc::AT_FDCWD, path.as_ptr())
        };
        Errno::result(done)?;
        Ok(())
    }

    /// What has happened by now, some of it; nothing, if nothing has.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        let mut buffer = vec![0; BUFFER];
        match nix::unistd::read(&self.0, &mut buffer) {
            Ok(len) => Ok(parse(buffer.get(..len).unwrap_or_default())),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The one of a file that is open in any way.
pub fn handle_of(file: impl AsFd) -> io::Result<Handle> {
    const ROOM: usize = libc::MAX_HANDLE_SZ as usize;
    /// `struct file_handle`, with all the room that it can need.
    #[repr(C)]
    struct Raw {
        bytes: u32,
        kind: i32,
        handle: [u8; ROOM],
    }
    let mut raw = Raw { bytes: libc::MAX_HANDLE_SZ.cast_unsigned(), kind: 0, handle: [0; ROOM] };
    let mut mount = 0;
    // SAFETY: the kernel writes a number, and a handle of at most as many bytes as there is said to be room for.
    let done = unsafe {
        libc::name_to_handle_at(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            std::ptr::from_mut(&mut raw).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::result(done)?;
    let bytes = raw.handle.get(..raw.bytes as usize).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Handle { kind: raw.kind, bytes: bytes.to_vec() })
}

fn path_of(file: BorrowedFd<'_>) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What the kernel says, one after the other.
fn parse(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(len) = word(bytes, 0).map(|len| len as usize)
        && let Some(one) = bytes.get(..len)
        && len >= METADATA
    {
        events.extend(event(one));
        bytes = &bytes[len..];
    }
    events
}

fn event(bytes: &[u8]) -> Option<Event> {
    let about = usize::from(u16::from_ne_bytes(*bytes.get(6..)?.first_chunk()?));
    let mask = u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let pid = word(bytes, 20)?;
    let mut event = Event { mask, pid, name: None, itself: None };
    let mut rest = bytes.get(about..)?;
    while let Some([kind, _, low, high]) = rest.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([*low, *high]));
        let Some(one) = rest.get(..len).filter(|one| one.len() >= INFORMATION) else { break };
        rest = &rest[len..];
        let Some((handle, behind)) = handle(&one[INFORMATION..]) else { continue };
        match *kind {
            libc::FAN_EVENT_INFO_TYPE_FID => event.itself = Some(handle),
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => {
                let name = behind.split(|byte| *byte == 0).next().unwrap_or_default();
                event.name = Some((handle, name.to_vec()));
            }
            _ => {}
        }
    }
    Some(event)
}

fn handle(bytes: &[u8]) -> Option<(Handle, &[u8])> {
    let len = word(bytes, 0)? as usize;
    let kind = word(bytes, 4)?.cast_signed();
    let (handle, behind) = bytes.get(8..)?.split_at_checked(len)?;
    Some((Handle { kind, bytes: handle.to_vec() }, behind))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn what_happens_is_told_with_names() {
        let path = std::env::temp_dir().join(format!("fanotify-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let group = match Group::new() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: no right to watch");
                return;
            }
            group => group.unwrap(),
        };
        fs::write(path.join("old"), "").unwrap();
        let (opened, old) = (File::open(&path).unwrap(), File::open(path.join("old")).unwrap());
        group.add(&opened, OF_DIRECTORY).unwrap();
        group.add(&old, OF_FILE).unwrap();
        assert_eq!(group.read().unwrap(), []);
        fs::write(path.join("new"), "x").unwrap();
        fs::create_dir(path.join("below")).unwrap();
        fs::remove_file(path.join("old")).unwrap();
        let events = group.read().unwrap();
        let directory = handle_of(&opened).unwrap();
        let of = |name: &str| -> u64 {
            let told = events.iter().filter(|event| {
                event.name.as_ref().is_some_and(|(at, found)| *at == directory && found == name.as_bytes())
            });
            told.fold(0, |mask, event| mask | event.mask)
        };
        let new = libc::FAN_CREATE | libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE;
        assert_eq!(of("new") & new, new, "{events:?}");
        let below = libc::FAN_CREATE | libc::FAN_ONDIR;
        assert_eq!(of("below") & below, below, "{events:?}");
        assert_eq!(of("old") & libc::FAN_DELETE, libc::FAN_DELETE, "{events:?}");
        let old = handle_of(&old).unwrap();
        assert!(events.iter().any(|event| event.itself.as_ref() == Some(&old)), "{events:?}");
        let own = std::process::id();
        assert!(events.iter().all(|event| event.pid == own), "{events:?}");
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_no_event() {
        assert_eq!(parse(&[]), []);
        assert_eq!(parse(&[0; METADATA]), []);
        assert_eq!(parse(&[0xff; METADATA]), []);
        let mut short = [0; 40];
        short[0] = 40;
        short[6] = 24;
        // A piece of information that says it is longer than all there is.
        short[24..28].copy_from_slice(&[1, 0, 200, 0]);
        assert_eq!(parse(&short), [Event { mask: 0, pid: 0, name: None, itself: None }]);
        // A handle that does.
        short[26] = 16;
        short[36] = 200;
        assert_eq!(parse(&short), [Event { mask: 0, pid: 0, name: None, itself: None }]);
    }
}

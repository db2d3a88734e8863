//! The file system device, section 5.11: FUSE requests over queues.
//!
//! What answers the requests is behind [`Server`], so that a server for another host system, or one
//! of our own, can take its place.

#[cfg(all(target_os = "linux", feature = "fs"))]
mod news;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod orphan;
#[cfg(all(target_os = "linux", feature = "fs"))]
pub mod passthrough;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod query;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod replay;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod reply;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod request;
#[cfg(all(target_os = "linux", feature = "fs"))]
mod saved;

use std::fmt;
use std::io;
use std::sync::Arc;

use super::queue::Chain;
use super::state::{decode, encode, same};
use super::{ActivateError, Activation, Broken, Device, Serve, StateError, Worker};

const KIND: u32 = 26;
/// Bytes of a tag.
pub const TAG_MAX: usize = 36;
/// Requests that may pass others (forgetting, interrupting), then the request queues.
const QUEUE_SIZE: u16 = 256;
/// More queues than this find no work.
pub const REQUEST_QUEUES_MAX: u16 = 8;

/// What the guest may keep of what it has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Cache {
    /// Nothing: whatever the host changes is seen at once.
    Never,
    /// Contents until a file is opened again, names and attributes for a second.
    #[default]
    Auto,
    /// Contents until a file is opened again: what the host renames, removes or replaces is seen at once.
    Fresh,
    /// Everything, for a day: nobody else changes the directory.
    Always,
}

/// The four groups, in a row from this one, by which a guest tells its own kernel what the host has changed: those of
/// their requests that say so are answered as if they were done, and change nothing on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct News(u32);

impl News {
    /// From the group `first` on, if all four are groups that somebody can have, and none is root's.
    pub fn from(first: u32) -> Option<Self> {
        (1..=u32::MAX - 4).contains(&first).then_some(Self(first))
    }
}

/// Answers FUSE requests. Called from one thread a queue, at the same time.
pub trait Server: Send + Sync {
    /// Readies the calling thread.
    fn enter_thread(&self) -> io::Result<()>;

    /// Answers one request in place and says how many bytes it wrote.
    fn handle(&self, chain: Chain) -> Result<u32, Broken>;

    /// The guest has gone or starts over: forget its files.
    fn forget(&self);

    /// All that it knows of the guest, while nothing is asked of it. It goes on as if it had not been asked.
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Becomes what was saved, over the same files or others, before anything is asked of it. Of these there must be
    /// those that the guest has open; of all others it learns when it looks for them.
    fn restore(&self, state: &[u8]) -> Result<(), StateError>;
}

/// The tag cannot name a share.
#[derive(Debug, thiserror::Error)]
#[error("the tag {0:?} of a share: it has 1 to {TAG_MAX} bytes")]
pub struct TagError(String);

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    tag: String,
    server: Vec<u8>,
}

/// The device.
pub struct Fs {
    tag: [u8; TAG_MAX],
    sizes: Vec<u16>,
    server: Arc<dyn Server>,
    workers: Vec<Worker<OneQueue>>,
    /// The server may know something of the guest.
    known: bool,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fs({:?})", self.tag())
    }
}

impl Fs {
    /// A share that the guest mounts by `tag`, with as many request queues.
    pub fn new(tag: &str, request_queues: u16, server: Arc<dyn Server>) -> Result<Self, TagError> {
        if tag.is_empty() || tag.len() > TAG_MAX {
            return Err(TagError(tag.into()));
        }
        let mut padded = [0; TAG_MAX];
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let queues = 1 + request_queues.clamp(1, REQUEST_QUEUES_MAX);
        Ok(Self {
            tag: padded,
            sizes: vec![QUEUE_SIZE; queues.into()],
            server,
            workers: Vec::new(),
            known: false,
        })
    }

    fn tag(&self) -> String {
        String::from_utf8_lossy(&self.tag).trim_end_matches('\0').to_owned()
    }
}

/// Each queue has a thread: a request that waits, for a lock or for a slow disk, holds up no other
/// queue.
struct OneQueue(Arc<dyn Server>);

impl Serve for OneQueue {
    fn begin(&mut self) -> io::Result<()> {
        self.0.enter_thread()
    }

    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        self.0.handle(chain)
    }
}

impl Device for Fs {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn configuration(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend((self.sizes.len() as u32 - 1).to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { ram, queues, signals, standstill, features } = activation;
        self.known = true;
        for (index, queue) in queues.into_iter().enumerate() {
            let part = Activation {
                ram: Arc::clone(&ram),
                queues: vec![queue],
                signals: Arc::clone(&signals),
                standstill: Arc::clone(&standstill),
                features,
            };
            let worker = Worker::spawn(&format!("fs{index}"), OneQueue(Arc::clone(&self.server)), part)
                .map_err(|source| ActivateError { device: "fs", source })?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&State { tag: self.tag(), server: self.server.save()? })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let State { tag, server } = decode(state)?;
        same("tag", &tag, &self.tag())?;
        self.known = true;
        self.server.restore(&server)
    }

    fn reset(&mut self) {
        self.workers.clear();
        if std::mem::take(&mut self.known) {
            self.server.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Nothing {
        forgotten: AtomicU32,
    }

    impl Server for Nothing {
        fn enter_thread(&self) -> io::Result<()> {
            Ok(())
        }
        fn handle(&self, _: Chain) -> Result<u32, Broken> {
            Ok(0)
        }
        fn forget(&self) {
            self.forgotten.fetch_add(1, Ordering::SeqCst);
        }
        fn save(&self) -> Result<Vec<u8>, StateError> {
            Ok(vec![7])
        }
        fn restore(&self, state: &[u8]) -> Result<(), StateError> {
            if state == [7] { Ok(()) } else { Err(StateError("it is not a seven".into())) }
        }
    }

    #[test]
    fn a_tag_fits_or_is_refused() {
        for (tag, ok) in [("r", true), (&"x".repeat(36), true), (&"x".repeat(37), false), ("", false)] {
            assert_eq!(Fs::new(tag, 1, Arc::new(Nothing::default())).is_ok(), ok, "{tag:?}");
        }
    }

    #[test]
    fn a_share_goes_on_by_its_tag_and_what_was_restored_can_be_forgotten() {
        let bytes = Fs::new("rootfs", 1, Arc::new(Nothing::default())).unwrap().save().unwrap();
        let server = Arc::new(Nothing::default());
        let forgotten = || server.forgotten.load(Ordering::SeqCst);
        let mut fs = Fs::new("rootfs", 1, Arc::clone(&server) as Arc<dyn Server>).unwrap();
        fs.reset();
        assert_eq!(forgotten(), 0);
        fs.restore(&bytes).unwrap();
        assert_eq!(fs.save().unwrap(), bytes);
        fs.reset();
        fs.reset();
        assert_eq!(forgotten(), 1);
        let mut other = Fs::new("data", 1, server.clone()).unwrap();
        let error = other.restore(&bytes).unwrap_err().to_string();
        assert!(error.contains("tag was rootfs and is data here"), "{error}");
        let strange = encode(&State { tag: "rootfs".into(), server: vec![8] }).unwrap();
        assert!(fs.restore(&strange).unwrap_err().to_string().contains("seven"));
        fs.reset();
        assert_eq!(forgotten(), 2);
    }

    #[test]
    fn news_is_of_four_groups() {
        for (first, ok) in
            [(0, false), (1, true), (u32::MAX - 4, true), (u32::MAX - 3, false), (u32::MAX, false)]
        {
            assert_eq!(News::from(first).is_some(), ok, "{first}");
        }
    }

    #[test]
    fn the_configuration_names_tag_and_queues() {
        for (asked, queues) in [(0, 1), (1, 1), (4, 4), (1000, REQUEST_QUEUES_MAX)] {
            let fs = Fs::new("rootfs", asked, Arc::new(Nothing::default())).unwrap();
            assert_eq!(fs.queues().len(), usize::from(queues) + 1);
            let config = fs.configuration();
            assert_eq!(&config[..8], b"rootfs\0\0");
            assert_eq!(config[36..40], u32::from(queues).to_le_bytes());
        }
    }
}

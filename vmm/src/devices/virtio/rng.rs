//! The entropy device, section 5.4: every buffer comes back full of the host's randomness.

use virtio_queue::Writer;

use super::queue::Chain;
use super::{ActivateError, Activation, Broken, Device, Serve, Worker};
use crate::entropy;
use crate::memory::RamSlice;

const KIND: u32 = 4;
const QUEUES: [u16; 1] = [64];
/// A request is answered with at most this much, however large its buffers are. Drivers ask for less
/// than a page.
const ANSWER_MAX: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker<Source>>,
}

#[derive(Debug)]
struct Source;

impl Device for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let worker = Worker::spawn("rng", Source, activation)
            .map_err(|source| ActivateError { device: "rng", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

impl Serve for Source {
    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        let ram = chain.memory().clone();
        let mut writer: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
        let mut buffer = [0; ANSWER_MAX];
        let len = writer.available_bytes().min(ANSWER_MAX);
        let bytes = &mut buffer[..len];
        // Without randomness an empty answer is right and a predictable one is not.
        if let Err(error) = entropy::fill(bytes) {
            log::error!("no randomness for the guest: {error}");
            return Ok(0);
        }
        std::io::Write::write_all(&mut writer, bytes).map_err(|error| Broken(error.to_string()))?;
        // At most ANSWER_MAX.
        Ok(len as u32)
    }
}

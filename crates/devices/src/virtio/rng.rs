//! The entropy device (virtio 1.2 section 5.4): one queue of buffers to fill.

use std::fs::File;
use std::io::Read;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::active::ActiveQueue;
use super::chain::Chain;
use super::{Activation, DeviceKind, DeviceState, VirtioDevice};
use crate::snapshot::RestoreError;

const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes for one request: the device may give less than there is room for (5.4.6.2).
const MAX_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: usize = 4096;

/// A small, fast generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) for runs that
/// must be reproducible. Not for secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator whose whole sequence follows from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn fill(&mut self, data: &mut [u8]) {
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Where the bytes come from.
pub enum Entropy {
    /// The host kernel's generator.
    Host(File),
    /// A reproducible sequence.
    Seeded(SplitMix64),
}

impl Entropy {
    /// The host's generator.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be opened.
    pub fn host() -> std::io::Result<Self> {
        Ok(Self::Host(File::open("/dev/urandom")?))
    }

    /// A reproducible sequence, for `--clock icount`.
    #[must_use]
    pub const fn seeded(seed: u64) -> Self {
        Self::Seeded(SplitMix64::new(seed))
    }

    fn fill(&mut self, data: &mut [u8]) -> bool {
        match self {
            Self::Host(file) => file.read_exact(data).is_ok(),
            Self::Seeded(generator) => {
                generator.fill(data);
                true
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    generator: Option<SplitMix64>,
}

/// A virtio entropy device.
pub struct Rng {
    name: String,
    entropy: Entropy,
    queue: Option<ActiveQueue>,
    chain: Chain,
    requests: u64,
    bytes: u64,
}

impl Rng {
    /// An entropy device named `name`.
    #[must_use]
    pub fn new(name: &str, entropy: Entropy) -> Self {
        let chain = Chain::default();
        Self { name: name.to_owned(), entropy, queue: None, chain, requests: 0, bytes: 0 }
    }

    fn serve(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        let budget = 16 * usize::from(queue.size());
        let (entropy, requests, bytes) = (&mut self.entropy, &mut self.requests, &mut self.bytes);
        queue.drain(&mut self.chain, budget, |memory, chain| {
            let mut to = chain.writer(memory).limited(MAX_BYTES);
            let mut block = [0; BLOCK_BYTES];
            let mut done = 0u32;
            while to.remaining() > 0 {
                let now = usize::try_from(to.remaining()).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
                if !entropy.fill(&mut block[..now]) || to.write(&block[..now]).is_err() {
                    break;
                }
                done = done.saturating_add(u32::try_from(now).unwrap_or(0));
            }
            *requests += 1;
            *bytes = bytes.wrapping_add(u64::from(done));
            done
        });
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, transitional_id: 0x1005, class: 0x00_ff00 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) {
        self.queue = activation.queues.into_iter().next().flatten();
        self.serve();
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn notify(&mut self, queue: u16) {
        if queue == 0 {
            self.serve();
        }
    }

    fn save(&self) -> DeviceState {
        let generator = match &self.entropy {
            Entropy::Host(_) => None,
            Entropy::Seeded(generator) => Some(generator.clone()),
        };
        let data = serde_json::to_value(State { generator }).expect("plain data serialises");
        DeviceState { queues: vec![self.queue.as_ref().map(ActiveQueue::position)], data }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        self.reset();
        // A host generator has no state: after a restore it must give other numbers than before, not the same again.
        if let (Entropy::Seeded(mine), Some(saved)) = (&mut self.entropy, state.generator) {
            *mine = saved;
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.requests), ("bytes", self.bytes)]
    }
}

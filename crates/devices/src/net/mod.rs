//! What network cards have in common: the thread that carries frames, and where a card is plugged in. [`e1000`] is a card
//! of its own; the virtio one is [`crate::virtio::net`].

pub mod e1000;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod worker;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hostnet::Backend;
pub use hostnet::Mac;

/// Where a card is plugged in. It outlives the card: a reset of the machine makes another one.
pub type Plug = Arc<Mutex<Box<dyn Backend>>>;

/// Who carries frames when a driver rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbell {
    /// The card's thread, which is woken if it sleeps: the vCPU goes on at once.
    #[default]
    Thread,
    /// The vCPU that rings, if the thread is not at work: no other thread need wake.
    Vcpu,
}

/// How a card deals with its driver; each can be turned off to see what it brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardOptions {
    /// Sends are combined: while frames are being moved the driver need not ring. Off: each frame rings.
    pub combine: bool,
    /// Completions are told through shared memory, with interrupts only where the driver asks (virtio's event index, the
    /// e1000's throttling). Off: each frame interrupts.
    pub suppress: bool,
    /// The backend's offloads are offered to the driver.
    pub offload: bool,
    /// Who moves frames when the driver rings.
    pub doorbell: Doorbell,
}

impl Default for CardOptions {
    fn default() -> Self {
        Self { combine: true, suppress: true, offload: true, doorbell: Doorbell::default() }
    }
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// There is more to do at once.
    More,
    /// Nothing is left.
    Idle,
    /// The guest offers no buffers, and a frame waits.
    NoRoom,
}

/// A card as its thread sees it. A round is bounded, and no backend blocks.
pub(crate) trait Card: Send + Sync + 'static {
    /// Takes what the driver wants sent.
    fn transmit(&self, backend: &mut dyn Backend) -> Round;

    /// Gives the driver what the backend has for it.
    fn receive(&self, backend: &mut dyn Backend) -> Round;

    /// Tells the driver of a link that went up or down.
    fn note_link(&self, up: bool);

    /// After what time there is something to do whatever happens.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// Bytes in network order at `at`, which the caller knows to be there.
fn word(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |w| u16::from_be_bytes([w[0], w[1]]))
}

/// The Internet checksum's sum (RFC 1071) of `bytes` on top of `start`, folded and not complemented.
fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut wide = u64::from(start);
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        wide += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut last = [0; 4];
    let rest = chunks.remainder();
    last[..rest.len()].copy_from_slice(rest);
    wide += u64::from(u32::from_be_bytes(last));
    while wide > 0xffff {
        wide = (wide & 0xffff) + (wide >> 16);
    }
    u16::try_from(wide).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_is_that_of_sixteen_bit_words() {
        // The example of RFC 1071 3.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
        let bytes: Vec<u8> = (0..=254).collect();
        for len in 0..bytes.len() {
            let mut padded = bytes[..len].to_vec();
            padded.resize(len.next_multiple_of(2), 0);
            let mut slow: u32 = 7;
            for pair in padded.chunks(2) {
                slow += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
                slow = (slow & 0xffff) + (slow >> 16);
            }
            assert_eq!(u32::from(sum(&bytes[..len], 7)), slow, "{len}");
        }
    }
}

//! Datagrams of the guest that come in pieces (RFC 791 3.2, RFC 8200 4.5) are put together.
//!
//! INV-USER-1: at most [`PACKETS`] at a time, of which the oldest gives way; none is longer than an IP packet can be, and
//! none that has pieces which lie over each other comes to anything (RFC 5722).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets that are being put together.
const PACKETS: usize = 16;
/// How long the rest of one is waited for.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest payload.
const LONGEST: usize = 65_535;
/// Most pieces of one: smaller ones than 64 KiB in the smallest packets make no sense.
const PIECES: usize = 512;

/// Which packet a piece is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: u8,
    pub identification: u32,
}

struct Packet {
    key: Key,
    since: Instant,
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Length of all of it, once the last piece was seen.
    len: Option<usize>,
}

/// Packets that are not whole yet.
#[derive(Default)]
pub(super) struct Fragments(Vec<Packet>);

impl Fragments {
    /// Takes a piece that begins at byte `at`, and the payload of its packet when that is whole.
    pub fn take(&mut self, key: Key, at: usize, more: bool, piece: &[u8]) -> Option<Vec<u8>> {
        let now = Instant::now();
        self.0.retain(|packet| now.duration_since(packet.since) < PATIENCE);
        let index = self.0.iter().position(|packet| packet.key == key).unwrap_or_else(|| {
            if self.0.len() == PACKETS {
                self.0.remove(0);
            }
            self.0.push(Packet { key, since: now, pieces: BTreeMap::new(), len: None });
            self.0.len() - 1
        });
        let packet = &mut self.0[index];
        if !packet.add(at, more, piece) {
            self.0.remove(index);
            return None;
        }
        let whole = packet.whole()?;
        self.0.remove(index);
        Some(whole)
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl Packet {
    /// Adds a piece; false for one that cannot be of this packet.
    fn add(&mut self, at: usize, more: bool, piece: &[u8]) -> bool {
        let end = at + piece.len();
        if piece.is_empty() || end > LONGEST || self.pieces.len() >= PIECES {
            return false;
        }
        if !more && self.len.replace(end).is_some_and(|before| before != end) {
            return false;
        }
        let before = self.pieces.range(..end).next_back();
        if before.is_some_and(|(&start, other)| start + other.len() > at) {
            // The same again is no harm.
            return self.pieces.get(&at).is_some_and(|same| same == piece);
        }
        self.pieces.insert(at, piece.to_vec());
        true
    }

    fn whole(&self) -> Option<Vec<u8>> {
        let len = self.len?;
        let mut all = Vec::with_capacity(len);
        for (&at, piece) in &self.pieces {
            if at != all.len() {
                return None;
            }
            all.extend(piece);
        }
        (all.len() == len).then_some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(identification: u32) -> Key {
        let address = IpAddr::from([10, 0, 2, 15]);
        Key { from: address, to: address, protocol: 17, identification }
    }

    #[test]
    fn pieces_come_in_any_order_and_twice() {
        let mut fragments = Fragments::default();
        assert_eq!(fragments.take(key(1), 16, false, b"end"), None);
        assert_eq!(fragments.take(key(2), 0, true, b"........"), None);
        assert_eq!(fragments.take(key(1), 0, true, b"beginnin"), None);
        assert_eq!(fragments.take(key(1), 0, true, b"beginnin"), None);
        assert_eq!(fragments.take(key(1), 8, true, b"g middle"), Some(b"beginning middleend".to_vec()));
        assert_eq!(fragments.0.len(), 1);
    }

    #[test]
    fn nonsense_is_forgotten_and_nothing_piles_up() {
        let mut fragments = Fragments::default();
        fragments.take(key(1), 0, true, &[1; 16]);
        assert_eq!(fragments.take(key(1), 8, false, &[2; 16]), None, "pieces over each other");
        assert!(fragments.0.is_empty());
        assert_eq!(fragments.take(key(1), 65_528, false, &[0; 16]), None, "too long");
        fragments.take(key(1), 32, false, &[0; 8]);
        assert_eq!(fragments.take(key(1), 40, false, &[0; 8]), None, "two ends");
        for n in 0..100 {
            fragments.take(key(n), 8, true, &[0; 1480]);
        }
        assert_eq!(fragments.0.len(), PACKETS);
        for n in 0..10_000 {
            fragments.take(key(7), (n * 16) % 65_000, true, &[0; 8]);
        }
        assert!(fragments.0.iter().all(|packet| packet.pieces.len() <= PIECES));
    }
}

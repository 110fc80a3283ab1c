//! The host's end of a guest's network: what is behind a network card.
//!
//! Way of the data: a card (`devices::virtio::net`) hands Ethernet frames to a [`Backend`] and takes frames from it, in one
//! thread of its own that sleeps until one of the backend's file descriptors or the guest has something. Three backends:
//! [`user`] (a router in this process, on ordinary sockets), [`tap`] (an interface of the host) and [`link`] (a socket to
//! another machine, or to a program such as `passt`).
//!
//! Nothing here blocks, and nothing that a guest or a peer sends makes memory grow: what finds no room is dropped, as
//! networks do, or stays in the host's sockets.

mod forward;
pub mod link;
pub mod tap;
pub mod user;

use std::os::fd::BorrowedFd;
use std::time::Duration;

pub use forward::{Forward, Protocol};
pub use rustix::event::PollFlags;

/// The longest frame: an IP packet of 65535 bytes behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;

/// A file descriptor, and the events of it that are waited for.
pub type Interest<'a> = (BorrowedFd<'a>, PollFlags);

/// A hardware address.
pub type Mac = [u8; 6];

/// Work on frames that one side leaves to the other. For a backend: what it can take from the guest, and give to it if the
/// guest accepts that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is to be completed.
    pub checksum: bool,
    /// TCP over IPv4 in frames longer than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 in frames longer than the MTU.
    pub tso6: bool,
}

/// What goes with a frame: `struct virtio_net_hdr` without the number of buffers (virtio 1.2 5.1.6), which Linux's TAP
/// has, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`Header::NEEDS_CHECKSUM`] and others.
    pub flags: u8,
    /// [`Header::TCP4`] and others; 0 for an ordinary frame.
    pub gso_type: u8,
    /// Length of all protocol headers of a frame to be segmented; a hint.
    pub header_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the bytes begin that a missing checksum covers.
    pub checksum_start: u16,
    /// Where, from there, the checksum goes.
    pub checksum_offset: u16,
}

impl Header {
    /// Its length in bytes.
    pub const LEN: usize = 10;
    /// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the sum of the pseudo header only.
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// `VIRTIO_NET_HDR_GSO_TCPV4`.
    pub const TCP4: u8 = 1;
    /// `VIRTIO_NET_HDR_GSO_TCPV6`.
    pub const TCP6: u8 = 4;

    /// As it lies in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [h0, h1] = self.header_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.checksum_start.to_le_bytes();
        let [o0, o1] = self.checksum_offset.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// The reverse.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = bytes;
        Self {
            flags,
            gso_type,
            header_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            checksum_start: u16::from_le_bytes([s0, s1]),
            checksum_offset: u16::from_le_bytes([o0, o1]),
        }
    }
}

/// What is behind a network card. Used by one thread at a time.
pub trait Backend: Send {
    /// What work it can take over; always the same.
    fn offloads(&self) -> Offloads;

    /// A driver begins anew, and accepts so much. Connections of the one before are over.
    fn start(&mut self, accepts: Offloads);

    /// The guest sends `frame`, which is never longer than [`MAX_FRAME`]. Does not wait: what finds no room is lost.
    fn send(&mut self, header: &Header, frame: &[u8]);

    /// Appends the next frame for the guest to `to`, at most [`MAX_FRAME`] bytes. `None` when there is none now.
    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header>;

    /// Moves on what does not depend on the guest: called after frames were sent, and after each sleep.
    fn work(&mut self) {}

    /// What to sleep on: adds file descriptors, and says after what time to call again in any case. Without `room` in the
    /// guest the next [`Backend::receive`] is not near.
    fn sleep_on<'a>(&'a self, room: bool, list: &mut Vec<Interest<'a>>) -> Option<Duration>;

    /// Whether the other end is there.
    fn is_up(&self) -> bool {
        true
    }

    /// Named counters.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A backend that cannot be had: one line with what to do.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The TAP interface.
    #[error("cannot use the TAP interface {name}: {source}{hint}")]
    Tap {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A socket to another machine.
    #[error("cannot link machines at {path}: {source}{hint}")]
    Link {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A port to be forwarded.
    #[error("cannot forward {forward}: {source}{hint}")]
    Forward {
        /// As the user wrote it.
        forward: String,
        /// Why.
        source: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
}

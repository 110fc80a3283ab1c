//! An interface of the host: Linux's TAP, with `struct virtio_net_hdr` before each frame, so that the host's kernel does the
//! work that offloads leave.

#![expect(unsafe_code, reason = "the ioctls of /dev/net/tun have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use rustix::event::PollFlags;

use crate::{Backend, Header, Interest, MAX_FRAME, NetError, Offloads};

/// Longest name of an interface (`IFNAMSIZ` without its end).
const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// A TAP interface.
pub struct Tap {
    file: File,
    buffer: Vec<u8>,
    lost: u64,
}

impl Tap {
    /// The interface called `name`, which is made if the user may do that.
    ///
    /// # Errors
    /// When it cannot be had, with what to do.
    pub fn new(name: &str) -> Result<Self, NetError> {
        Self::open(name).map_err(|source| {
            let hint = match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    "; let the administrator make it: ip tuntap add NAME mode tap user YOU"
                }
                Some(libc::ENOENT | libc::ENODEV) => "; load the module tun, or use --net user",
                Some(libc::EBUSY) => "; another program uses it",
                Some(libc::EINVAL) => "; it is no TAP interface, or its name is too long",
                _ => "",
            };
            NetError::Tap { name: name.to_owned(), source, hint }
        })
    }

    fn open(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: ifreq is plain data, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
        // SAFETY: TUNSETIFF reads and writes an ifreq, which lives until the call returns.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let len = libc::c_int::try_from(Header::LEN).unwrap_or(0);
        // SAFETY: TUNSETVNETHDRSZ reads an int, which lives until the call returns.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
        Ok(Self { file, buffer: vec![0; Header::LEN + MAX_FRAME], lost: 0 })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Backend for Tap {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn start(&mut self, accepts: Offloads) {
        let only = |wanted, flag| if wanted { flag } else { 0 };
        let flags = only(accepts.checksum, libc::TUN_F_CSUM)
            | only(accepts.tso4, libc::TUN_F_TSO4)
            | only(accepts.tso6, libc::TUN_F_TSO6);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = check(unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags))
        });
        if let Err(error) = set {
            tracing::warn!(%error, "the TAP interface does not take offloads back");
        }
    }

    fn send(&mut self, header: &Header, frame: &[u8]) {
        self.buffer.clear();
        self.buffer.extend(header.to_bytes());
        self.buffer.extend(frame);
        // What the interface does not take (it is down, its queue full, the header is nonsense) is lost.
        if self.file.write(&self.buffer).is_err() {
            self.lost += 1;
        }
    }

    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        self.buffer.resize(Header::LEN + MAX_FRAME, 0);
        let len = self.file.read(&mut self.buffer).ok()?;
        let (header, frame) = self.buffer[..len].split_first_chunk::<{ Header::LEN }>()?;
        to.extend_from_slice(frame);
        Some(Header::from_bytes(*header))
    }

    fn sleep_on<'a>(&'a self, room: bool, list: &mut Vec<Interest<'a>>) -> Option<Duration> {
        if room {
            list.push((self.file.as_fd(), PollFlags::IN));
        }
        None
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("lost", self.lost)]
    }
}

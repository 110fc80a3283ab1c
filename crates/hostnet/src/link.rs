//! A wire to another machine: a unix socket that carries frames, each behind its length in four bytes, big-endian. QEMU's
//! `-netdev stream` and `passt --socket` speak the same.
//!
//! Who finds nobody at the path listens there; who finds somebody connects. When the other goes, the link is down until
//! somebody comes again: who listened listens on, who had connected looks for the path again, and takes it over if nobody
//! listens there.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::{Backend, Header, Interest, MAX_FRAME, NetError, Offloads};

/// Bytes that wait for the other end to take them; a frame that finds no room is lost.
const WAITING: usize = 1 << 20;
/// How often the other end is looked for.
const LOOK: Duration = Duration::from_millis(500);
/// Read at a time.
const BLOCK: usize = 64 << 10;
const LENGTH: usize = 4;

/// A link to another machine.
pub struct Link {
    path: PathBuf,
    /// Listens, on a socket that is this file.
    listener: Option<(UnixListener, Place)>,
    stream: Option<UnixStream>,
    looked: Instant,
    outgoing: VecDeque<u8>,
    incoming: Vec<u8>,
    /// What of `incoming` is taken.
    taken: usize,
    lost: u64,
}

impl Link {
    /// A link at `path`.
    ///
    /// # Errors
    /// When one can neither connect nor listen there.
    pub fn new(path: &Path) -> Result<Self, NetError> {
        let mut link = Self {
            path: path.to_owned(),
            listener: None,
            stream: None,
            looked: Instant::now(),
            outgoing: VecDeque::new(),
            incoming: Vec::new(),
            taken: 0,
            lost: 0,
        };
        link.look().map_err(|source| {
            let hint = match source.kind() {
                io::ErrorKind::PermissionDenied => "; name a path that you may write",
                io::ErrorKind::NotFound => "; name a path in a directory that exists",
                io::ErrorKind::AlreadyExists => "; there is a file that is no socket, name another path",
                _ => "",
            };
            NetError::Link { path: path.display().to_string(), source, hint }
        })?;
        Ok(link)
    }

    /// Connects, or listens. Two that begin at the same moment may find each other half way there: then again.
    fn look(&mut self) -> io::Result<()> {
        const TRIES: u32 = 5;
        for _ in 1..TRIES {
            match self.look_once(false) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::AddrInUse
                    ) =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other,
            }
        }
        self.look_once(true)
    }

    /// Connects, or listens; at a socket to which nobody listens only if it is `abandoned`.
    fn look_once(&mut self, abandoned: bool) -> io::Result<()> {
        self.looked = Instant::now();
        match UnixStream::connect(&self.path) {
            Ok(stream) => self.connected(stream),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                use std::os::unix::fs::FileTypeExt as _;
                if !std::fs::symlink_metadata(&self.path)?.file_type().is_socket() {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                if !abandoned {
                    return Err(error);
                }
                std::fs::remove_file(&self.path)?;
                self.listen()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.listen(),
            Err(error) => Err(error),
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let listener = UnixListener::bind(&self.path)?;
        listener.set_nonblocking(true)?;
        self.listener = Some((listener, place(&self.path)));
        Ok(())
    }

    fn connected(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.outgoing.clear();
        self.incoming.clear();
        self.taken = 0;
        self.stream = Some(stream);
        Ok(())
    }

    /// Nobody is there: looks for somebody, unless he will find us.
    fn look_again(&mut self) {
        self.looked = Instant::now();
        if self.listener.as_ref().is_some_and(|(_, ours)| ours.is_some() && *ours == place(&self.path)) {
            return;
        }
        self.listener = None;
        // It is tried again and again.
        let _retried = self.look_once(true);
    }

    /// The other end went away, or is not to be understood.
    fn disconnect(&mut self) {
        self.stream = None;
        self.outgoing.clear();
        self.incoming.clear();
        self.taken = 0;
        self.looked = Instant::now();
    }

    fn flush(&mut self) {
        while let (Some(stream), false) = (&mut self.stream, self.outgoing.is_empty()) {
            match stream.write(self.outgoing.as_slices().0) {
                Ok(0) => return,
                Ok(len) => drop(self.outgoing.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.disconnect(),
            }
        }
    }

    /// Reads one block, if the last was used up to less than a frame.
    fn fill(&mut self) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        self.incoming.drain(..self.taken);
        self.taken = 0;
        let old = self.incoming.len();
        self.incoming.resize(old + BLOCK, 0);
        let read = stream.read(&mut self.incoming[old..]);
        self.incoming.truncate(old + read.as_ref().map_or(0, |&len| len));
        match read {
            Ok(0) => self.disconnect(),
            Ok(_) => return true,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.disconnect(),
        }
        false
    }

    /// The next whole frame that was read.
    fn next(&mut self) -> Option<std::ops::Range<usize>> {
        let rest = &self.incoming[self.taken..];
        let length = u32::from_be_bytes(rest.get(..LENGTH)?.try_into().ok()?);
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_FRAME {
            tracing::warn!(path = %self.path.display(), len, "the other end of a link sends no frames");
            self.disconnect();
            return None;
        }
        let start = self.taken + LENGTH;
        let end = start + len;
        (end <= self.incoming.len()).then(|| {
            self.taken = end;
            start..end
        })
    }
}

/// Which file a path names: device and number.
type Place = Option<(u64, u64)>;

fn place(path: &Path) -> Place {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

impl Backend for Link {
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn start(&mut self, _: Offloads) {}

    fn send(&mut self, _: &Header, frame: &[u8]) {
        if self.stream.is_none() || self.outgoing.len() + LENGTH + frame.len() > WAITING {
            self.lost += 1;
            return;
        }
        let length = u32::try_from(frame.len()).unwrap_or(0);
        self.outgoing.extend(length.to_be_bytes());
        self.outgoing.extend(frame);
    }

    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        loop {
            if let Some(frame) = self.next() {
                to.extend_from_slice(&self.incoming[frame]);
                return Some(Header::default());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    fn work(&mut self) {
        if self.stream.is_none() {
            let arrived = self.listener.as_ref().and_then(|(listener, _)| listener.accept().ok());
            if let Some((stream, _)) = arrived {
                let _retried = self.connected(stream);
            } else if self.looked.elapsed() >= LOOK {
                self.look_again();
            }
        }
        self.flush();
    }

    fn sleep_on<'a>(&'a self, room: bool, list: &mut Vec<Interest<'a>>) -> Option<Duration> {
        match (&self.stream, &self.listener) {
            (Some(stream), _) => {
                let mut flags = if room { PollFlags::IN } else { PollFlags::empty() };
                if !self.outgoing.is_empty() {
                    flags |= PollFlags::OUT;
                }
                if !flags.is_empty() {
                    list.push((stream.as_fd(), flags));
                }
                None
            }
            (None, Some((listener, _))) => {
                list.push((listener.as_fd(), PollFlags::IN));
                Some(LOOK)
            }
            (None, None) => Some(LOOK),
        }
    }

    fn is_up(&self) -> bool {
        self.stream.is_some()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("lost", self.lost)]
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.listener.as_ref().is_some_and(|(_, ours)| ours.is_some() && *ours == place(&self.path)) {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(link: &mut Link, other: &mut Link) -> Vec<u8> {
        let start = Instant::now();
        loop {
            let mut frame = Vec::new();
            if link.receive(&mut frame).is_some() {
                return frame;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no frame came");
            link.work();
            other.work();
        }
    }

    #[test]
    fn two_machines_talk_and_find_each_other_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let mut a = Link::new(&path).unwrap();
        let mut b = Link::new(&path).unwrap();
        a.work();
        assert!(a.is_up() && b.is_up());
        for len in [60, 1514, 65_000] {
            b.send(&Header::default(), &vec![9; len]);
            assert_eq!(next(&mut a, &mut b), vec![9; len]);
            a.send(&Header::default(), &vec![8; len]);
            assert_eq!(next(&mut b, &mut a), vec![8; len]);
        }
        // The listener goes; who had connected takes the path over.
        drop(a);
        assert!(b.receive(&mut Vec::new()).is_none() && !b.is_up());
        std::thread::sleep(LOOK);
        b.work();
        let mut c = Link::new(&path).unwrap();
        b.work();
        c.send(&Header::default(), &[1; 60]);
        assert_eq!(next(&mut b, &mut c), [1; 60]);
    }

    #[test]
    fn machines_that_begin_at_the_same_moment_meet() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..200 {
            let path = directory.path().join(round.to_string());
            let barrier = std::sync::Barrier::new(2);
            let begin = || {
                barrier.wait();
                Link::new(&path).unwrap()
            };
            let (mut a, mut b) = std::thread::scope(|scope| {
                let other = scope.spawn(begin);
                (begin(), other.join().unwrap())
            });
            a.work();
            b.work();
            assert!(a.is_up() && b.is_up(), "round {round}");
        }
    }

    #[test]
    fn listener_whose_path_was_taken_looks_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let mut a = Link::new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut b = Link::new(&path).unwrap();
        std::thread::sleep(LOOK);
        a.work();
        b.work();
        assert!(a.is_up() && b.is_up());
    }

    #[test]
    fn garbage_ends_the_connection_and_a_deaf_peer_costs_frames_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        let mut link = Link::new(&path).unwrap();
        let mut peer = UnixStream::connect(&path).unwrap();
        link.work();
        for _ in 0..10_000 {
            link.send(&Header::default(), &[5; 1500]);
            link.work();
        }
        assert!(link.outgoing.len() <= WAITING && link.lost > 0);
        peer.write_all(&[0xff; 64]).unwrap();
        assert!(link.receive(&mut Vec::new()).is_none() && !link.is_up());
        link.send(&Header::default(), &[5; 1500]);
    }

    #[test]
    fn file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"mine").unwrap();
        let error = Link::new(&path).err().unwrap().to_string();
        assert!(error.contains("another path"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let error = Link::new(&directory.path().join("no/where")).err().unwrap().to_string();
        assert!(error.contains("a directory that exists"), "{error}");
    }
}

//! All connections of a guest, and the sockets of the host behind them. Knows packets, not queues.
//!
//! A program of the host connects to the socket and says `CONNECT PORT`; when the guest has agreed it reads `OK PORT` (its own
//! port) and from there on what the guest's program writes. A connection of the guest to port P of the host goes to the socket
//! `PATH_P`. Nobody else is reached: there is one guest on this network.
//!
//! What a guest can make grow is bounded: [`MAX_CONNECTIONS`], what each keeps, and the refusals that wait ([`Hub::is_full`]).

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::ops::Bound;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{Connection, Stage};
use super::packet::{HOST_CID, Header, STREAM, op};

/// Most connections of a guest, those that are about to be made included.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Most refusals that wait for the guest to take them.
const MAX_RESETS: usize = 64;
/// How long a program of the host may take to say where it wants to go, and the guest to answer.
const ASK_PATIENCE: Duration = Duration::from_secs(10);
/// How long what waits for a program of the host is kept when the guest is gone, and the other way.
const LINGER: Duration = Duration::from_secs(10);
/// The longest first line: `CONNECT 4294967295` and its end.
const MAX_LINE: usize = 32;
/// Where the host's own ports begin, away from those that people give to services.
const FIRST_PORT: u32 = 1 << 30;

/// Both ends' ports: the host's, the guest's.
type Key = (u32, u32);

/// A program of the host that has not said yet where it wants to go.
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    deadline: Instant,
    readable: bool,
}

/// Who waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Listener,
    Client(usize),
    Connection(Key),
}

/// See the module.
pub(super) struct Hub {
    cid: u64,
    path: PathBuf,
    clients: Vec<Client>,
    connections: BTreeMap<Key, Connection>,
    resets: VecDeque<Header>,
    next_port: u32,
    /// Who was served last.
    turn: Key,
    pub opened: u64,
    pub refused: u64,
    accept: bool,
}

impl Hub {
    pub fn new(cid: u64, path: &Path) -> Self {
        Self {
            cid,
            path: path.to_owned(),
            clients: Vec::new(),
            connections: BTreeMap::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            turn: (0, 0),
            opened: 0,
            refused: 0,
            accept: false,
        }
    }

    /// Lets go of everything: the driver is gone.
    pub fn clear(&mut self) {
        self.clients.clear();
        self.connections.clear();
        self.resets.clear();
    }

    /// Whether the guest must take something before more is taken from it.
    pub fn is_full(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether [`Hub::next`] may have something.
    pub fn has_news(&self) -> bool {
        let sends = |c: &Connection| c.owes() || c.may_send() && c.readable && c.credit() > 0;
        !self.resets.is_empty() || self.connections.values().any(sends)
    }

    pub fn open_now(&self) -> usize {
        self.connections.len()
    }

    fn has_room(&self) -> bool {
        self.clients.len() + self.connections.len() < MAX_CONNECTIONS
    }

    // ---- packets ------------------------------------------------------------------------------------------------

    /// Refuses what `header` wants, or ends what it speaks of.
    fn reset(&mut self, header: &Header) {
        self.refused += 1;
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: self.cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: op::RST,
            ..Header::default()
        });
    }

    /// Takes a packet of the guest.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.cid {
            return;
        }
        let key = (header.dst_port, header.src_port);
        if header.op == op::RST {
            self.connections.remove(&key);
        } else if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.reset(header);
        } else if let Some(connection) = self.connections.get_mut(&key) {
            connection.note_credit(header.buf_alloc, header.fwd_cnt);
            if !speak(connection, key, header, data) {
                self.connections.remove(&key);
                self.reset(header);
            }
        } else if header.op == op::REQUEST && self.has_room() {
            match call(&self.path, header.dst_port) {
                Ok(stream) => {
                    let mut connection = Connection::new(stream, Stage::Open, None);
                    connection.note_credit(header.buf_alloc, header.fwd_cnt);
                    connection.owe(op::RESPONSE);
                    self.opened += 1;
                    self.connections.insert(key, connection);
                }
                Err(error) => {
                    tracing::debug!(port = header.dst_port, %error, "nobody at the guest's port of the host");
                    self.reset(header);
                }
            }
        } else {
            self.reset(header);
        }
    }

    /// The next packet for the guest; its data are in the beginning of `data`.
    pub fn next(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(header) = self.resets.pop_front() {
            return Some(header);
        }
        let turn = self.turn;
        let behind = (Bound::Excluded(turn), Bound::Unbounded);
        // Twice around at most: those behind the last one served, then those up to it.
        let mut found = self.connections.range_mut(behind).find_map(|entry| produce(entry, data));
        if found.is_none() {
            found = self.connections.range_mut(..=turn).find_map(|entry| produce(entry, data));
        }
        let (key, op, flags, len) = found?;
        self.turn = key;
        let (buf_alloc, fwd_cnt) = self.connections.get_mut(&key).map_or((0, 0), Connection::tell_credit);
        Some(Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.0,
            dst_port: key.1,
            len: u32::try_from(len).unwrap_or(0),
            kind: STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
    }

    // ---- the host's sockets -------------------------------------------------------------------------------------

    /// What the host's sockets have brought: takes clients, asks the guest for them, delivers, ends what is over.
    pub fn work(&mut self, listener: &UnixListener, is_driven: bool, now: Instant) {
        if std::mem::take(&mut self.accept) {
            self.take_clients(listener, is_driven, now);
        }
        let clients = std::mem::take(&mut self.clients);
        for mut client in clients {
            match client.wants() {
                Wants::Port(port) => self.ask(client.stream, port, now),
                Wants::Time if now < client.deadline => self.clients.push(client),
                // Its stream is closed, which says enough.
                Wants::Time | Wants::Nonsense => self.refused += 1,
            }
        }
        self.connections.values_mut().for_each(Connection::deliver);
        self.end_what_is_over(now);
    }

    fn take_clients(&mut self, listener: &UnixListener, is_driven: bool, now: Instant) {
        while self.has_room() {
            let Ok((stream, _)) = listener.accept() else { return };
            if is_driven && stream.set_nonblocking(true).is_ok() {
                let deadline = now + ASK_PATIENCE;
                self.clients.push(Client { stream, line: Vec::new(), deadline, readable: true });
            }
        }
    }

    /// Asks the guest to take a connection to `port`.
    fn ask(&mut self, stream: UnixStream, port: u32, now: Instant) {
        // There is a free one: fewer connections than ports.
        while self.connections.contains_key(&(self.next_port, port)) {
            self.bump_port();
        }
        let key = (self.next_port, port);
        self.bump_port();
        let mut connection = Connection::new(stream, Stage::Asked, Some(now + ASK_PATIENCE));
        connection.owe(op::REQUEST);
        self.opened += 1;
        self.connections.insert(key, connection);
    }

    fn bump_port(&mut self) {
        self.next_port = self.next_port.checked_add(1).filter(|&port| port != u32::MAX).unwrap_or(FIRST_PORT);
    }

    fn end_what_is_over(&mut self, now: Instant) {
        let cid = self.cid;
        let mut over = Vec::new();
        for (&key, connection) in &mut self.connections {
            if connection.peer_is_gone() && connection.stage != Stage::Leaving {
                connection.stage = Stage::Leaving;
                connection.deadline = Some(now + LINGER);
            }
            if connection.we_are_gone() && connection.deadline.is_none() {
                connection.deadline = Some(now + LINGER);
            }
            let is_done = connection.stage == Stage::Leaving && !connection.has_waiting();
            if is_done || connection.deadline.is_some_and(|deadline| now >= deadline) {
                over.push(key);
            }
        }
        for key in over {
            // Packets that the guest has not seen need not come any more.
            self.connections.remove(&key);
            let (dst_port, src_port) = key;
            self.reset(&Header {
                src_cid: cid,
                dst_cid: HOST_CID,
                src_port,
                dst_port,
                kind: STREAM,
                ..Header::default()
            });
        }
    }

    /// What is waited for, and when something is due at the latest. `room`: the guest can take packets.
    pub fn interests(&self, room: bool) -> (Vec<(Who, PollFlags)>, Option<Instant>) {
        let mut list = Vec::new();
        if self.has_room() {
            list.push((Who::Listener, PollFlags::IN));
        }
        list.extend((0..self.clients.len()).map(|n| (Who::Client(n), PollFlags::IN)));
        for (&key, connection) in &self.connections {
            let mut flags = PollFlags::empty();
            let reads = room && connection.may_send() && connection.credit() > 0 && !connection.readable;
            flags.set(PollFlags::IN, reads);
            flags.set(PollFlags::OUT, connection.has_waiting() && !connection.writable);
            // Without flags poll still tells of the end; once is enough.
            if !(flags.is_empty() && connection.is_hung_up()) {
                list.push((Who::Connection(key), flags));
            }
        }
        let clients = self.clients.iter().map(|client| client.deadline);
        let due = clients.chain(self.connections.values().filter_map(|connection| connection.deadline)).min();
        (list, due)
    }

    /// The descriptors of `interests`.
    pub fn descriptors<'a>(
        &'a self,
        listener: &'a UnixListener,
        interests: &[(Who, PollFlags)],
    ) -> Vec<PollFd<'a>> {
        let of = |&(who, flags): &(Who, PollFlags)| match who {
            Who::Listener => Some(PollFd::new(listener, flags)),
            Who::Client(n) => self.clients.get(n).map(|client| PollFd::new(&client.stream, flags)),
            Who::Connection(key) => {
                self.connections.get(&key).map(|connection| PollFd::new(&connection.stream, flags))
            }
        };
        interests.iter().filter_map(of).collect()
    }

    /// What poll said of one.
    pub fn note(&mut self, who: Who, what: PollFlags) {
        let ended = what.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        match who {
            Who::Listener => self.accept |= !what.is_empty(),
            Who::Client(n) => {
                if let Some(client) = self.clients.get_mut(n) {
                    client.readable |= !what.is_empty();
                }
            }
            Who::Connection(key) => {
                let Some(connection) = self.connections.get_mut(&key) else { return };
                connection.readable |= what.contains(PollFlags::IN);
                connection.writable |= what.contains(PollFlags::OUT) || ended;
                if ended {
                    connection.hang_up();
                }
            }
        }
    }
}

/// What a packet of the guest does to a connection; false when it ends it.
fn speak(connection: &mut Connection, key: Key, header: &Header, data: &[u8]) -> bool {
    match (header.op, connection.stage) {
        (op::RESPONSE, Stage::Asked) => {
            connection.stage = Stage::Open;
            connection.deadline = None;
            // Few bytes, before any others; who does not take them is gone.
            connection.stream.write_all(format!("OK {}\n", key.0).as_bytes()).is_ok()
        }
        (op::RW, Stage::Open) => connection.take(data),
        (op::SHUTDOWN, Stage::Open | Stage::Leaving) => {
            connection.peer_stops(header.flags);
            true
        }
        (op::CREDIT_UPDATE, _) => true,
        (op::CREDIT_REQUEST, Stage::Open) => {
            connection.owe(op::CREDIT_UPDATE);
            true
        }
        _ => false,
    }
}

/// A packet of a connection, if it has one: key, operation, flags, bytes of data.
fn produce((&key, connection): (&Key, &mut Connection), data: &mut [u8]) -> Option<(Key, u16, u32, usize)> {
    if let Some((op, flags)) = connection.take_owed() {
        return Some((key, op, flags, 0));
    }
    match connection.fetch(data) {
        // It may have found the end, or that there is no credit, which the guest is told.
        0 => connection.take_owed().map(|(op, flags)| (key, op, flags, 0)),
        len => Some((key, op::RW, 0, len)),
    }
}

/// Connects to whoever serves the guest's `port`, without waiting.
fn call(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(name.as_os_str())?)?;
    Ok(UnixStream::from(socket))
}

/// What a client turned out to want.
enum Wants {
    Port(u32),
    Time,
    Nonsense,
}

impl Client {
    /// Reads on in its line, byte by byte: what follows it is for the guest.
    fn wants(&mut self) -> Wants {
        while self.readable {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return parse(&self.line).map_or(Wants::Nonsense, Wants::Port),
                Ok(1) if self.line.len() < MAX_LINE => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Ok(_) | Err(_) => return Wants::Nonsense,
            }
        }
        Wants::Time
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let (word, port) = line.split_once(' ')?;
    let port = port.parse().ok()?;
    word.eq_ignore_ascii_case("connect").then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_line_names_a_port() {
        assert_eq!(parse(b"CONNECT 1234"), Some(1234));
        assert_eq!(parse(b"connect 4294967295\r"), Some(u32::MAX));
        for bad in [&b""[..], b"CONNECT", b"CONNECT ", b"CONNECT -1", b"CONNECT 1 2", b"GET 1", b"\xff 1"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}

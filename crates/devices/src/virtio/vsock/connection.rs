//! One connection between a program of the guest and one of the host.
//!
//! Credit (virtio 1.2 5.10.6.3): each side says how large its buffer is and how many bytes it has taken out of it so far; the
//! other sends no more than fits. Towards the guest we hold nothing back: bytes are read from the host's program when they
//! may go on at once. Towards the host we keep at most [`BUFFER_BYTES`]; a guest that sends more has broken the rule, and
//! its connection ends.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::packet::{NO_RECEIVE, NO_SEND, op};

/// What may wait for a program of the host, in bytes: the buffer that the guest is told of.
pub(super) const BUFFER_BYTES: u32 = 128 << 10;
/// The guest is told of room that it does not know of when it knows of less than this.
const LOW_CREDIT: u32 = BUFFER_BYTES / 2;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host's program asked; the guest has not answered.
    Asked,
    /// Both have agreed.
    Open,
    /// One of both is leaving for good; what waits for the host is still delivered.
    Leaving,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    pub stream: UnixStream,
    pub stage: Stage,
    /// When [`Stage::Asked`] or [`Stage::Leaving`] ends it by itself.
    pub deadline: Option<Instant>,
    /// Packets without data that the guest is to get, by operation: a bit each, so that they are bounded.
    owed: u8,
    /// What this side will not do any more, as SHUTDOWN has it; and what the guest said of itself.
    ours: u32,
    theirs: u32,
    /// The stream may have something to read, or room to write.
    pub readable: bool,
    pub writable: bool,
    to_host: VecDeque<u8>,
    /// Bytes that went to the host's program, and what the guest was last told of them.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, its buffer, and what it took out of it.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    asked_credit: bool,
    /// The host's program is gone; what it wrote before is still read.
    hung_up: bool,
}

const fn owed_bit(op: u16) -> u8 {
    1 << (op & 7)
}

impl Connection {
    pub fn new(stream: UnixStream, stage: Stage, deadline: Option<Instant>) -> Self {
        Self {
            stream,
            stage,
            deadline,
            owed: 0,
            ours: 0,
            theirs: 0,
            readable: true,
            writable: true,
            to_host: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            asked_credit: false,
            hung_up: false,
        }
    }

    /// What every packet of the guest says of its buffer.
    pub fn note_credit(&mut self, buffer: u32, forwarded: u32) {
        (self.peer_buffer, self.peer_forwarded) = (buffer, forwarded);
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// Bytes that the guest has room for. A guest that claims to have taken more than it got has none.
    pub fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    pub fn owe(&mut self, op: u16) {
        self.owed |= owed_bit(op);
    }

    /// The next packet without data that the guest is to get: its operation and flags.
    pub fn take_owed(&mut self) -> Option<(u16, u32)> {
        let order = [op::REQUEST, op::RESPONSE, op::CREDIT_UPDATE, op::CREDIT_REQUEST, op::SHUTDOWN];
        let next = order.into_iter().find(|&op| self.owed & owed_bit(op) != 0)?;
        self.owed &= !owed_bit(next);
        Some((next, if next == op::SHUTDOWN { self.ours } else { 0 }))
    }

    pub fn owes(&self) -> bool {
        self.owed != 0
    }

    /// The fields of a header about our buffer.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUFFER_BYTES, self.forwarded)
    }

    /// Takes data of the guest; false when it is more than there was room for.
    pub fn take(&mut self, data: &[u8]) -> bool {
        if self.theirs & NO_SEND != 0 || self.to_host.len() + data.len() > BUFFER_BYTES as usize {
            return false;
        }
        self.to_host.extend(data);
        self.deliver();
        true
    }

    /// Writes what waits for the host's program.
    pub fn deliver(&mut self) {
        while self.writable && !self.to_host.is_empty() {
            match self.stream.write(self.to_host.as_slices().0) {
                Ok(count) => {
                    self.to_host.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => {
                    // The program is gone, or wants no more.
                    self.to_host.clear();
                    self.stop(NO_RECEIVE);
                }
            }
        }
        if self.to_host.is_empty() && self.theirs & NO_SEND != 0 {
            // It may be gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        // What the guest may still send, as far as it knows.
        let under_way = self.forwarded.wrapping_sub(self.told);
        if self.stage == Stage::Open && under_way > 0 && BUFFER_BYTES.saturating_sub(under_way) < LOW_CREDIT {
            self.owe(op::CREDIT_UPDATE);
        }
    }

    pub fn has_waiting(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// We do these things no more, and say so.
    pub fn stop(&mut self, what: u32) {
        if self.ours | what != self.ours {
            self.ours |= what;
            self.owe(op::SHUTDOWN);
        }
    }

    /// The host's program has closed its end for both directions.
    pub fn hang_up(&mut self) {
        self.hung_up = true;
        self.readable = true;
        if self.ours & NO_SEND != 0 {
            self.stop(NO_RECEIVE);
        }
    }

    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// We are done with it, and have said so or will.
    pub fn we_are_gone(&self) -> bool {
        self.ours == NO_RECEIVE | NO_SEND
    }

    /// The guest does these things no more.
    pub fn peer_stops(&mut self, what: u32) {
        self.theirs |= what & (NO_RECEIVE | NO_SEND);
        self.deliver();
    }

    /// The guest is done with it: it neither sends nor receives.
    pub fn peer_is_gone(&self) -> bool {
        self.theirs == NO_RECEIVE | NO_SEND
    }

    /// Whether data of the host's program may go to the guest now.
    pub fn may_send(&self) -> bool {
        self.stage == Stage::Open && self.ours & NO_SEND == 0 && self.theirs & NO_RECEIVE == 0
    }

    /// Reads data for the guest into `data`; says how much came.
    pub fn fetch(&mut self, data: &mut [u8]) -> usize {
        if !self.may_send() || !self.readable {
            return 0;
        }
        let room = data.len().min(usize::try_from(self.credit()).unwrap_or(usize::MAX));
        if room == 0 {
            if self.credit() == 0 && !self.asked_credit {
                self.asked_credit = true;
                self.owe(op::CREDIT_REQUEST);
            }
            return 0;
        }
        loop {
            match self.stream.read(&mut data[..room]) {
                Ok(0) => self.stop(if self.hung_up { NO_SEND | NO_RECEIVE } else { NO_SEND }),
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
                    return count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => self.stop(NO_SEND | NO_RECEIVE),
            }
            return 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        there.set_nonblocking(true).unwrap();
        (Connection::new(here, Stage::Open, None), there)
    }

    #[test]
    fn no_more_goes_to_the_guest_than_it_has_room_for() {
        let (mut connection, mut there) = pair();
        there.write_all(&[7; 100]).unwrap();
        let mut data = [0; 64];
        assert_eq!(connection.fetch(&mut data), 0);
        assert_eq!((connection.take_owed(), connection.take_owed()), (Some((op::CREDIT_REQUEST, 0)), None));
        connection.note_credit(30, 0);
        assert_eq!(connection.fetch(&mut data), 30);
        assert_eq!(connection.fetch(&mut data), 0);
        connection.note_credit(30, 25);
        assert_eq!(connection.fetch(&mut data), 25);
        // It says that it took what it never got.
        connection.note_credit(30, 1000);
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn a_program_that_does_not_read_bounds_what_we_keep() {
        let (mut connection, mut there) = pair();
        let mut taken = 0;
        while connection.take(&[1; 4096]) {
            taken += 4096;
            assert!(taken < 64 << 20, "no bound");
        }
        assert_eq!(connection.to_host.len(), BUFFER_BYTES as usize);
        let mut sink = vec![0; 1 << 20];
        let read = there.read(&mut sink).unwrap();
        connection.writable = true;
        connection.deliver();
        assert!(read > 0 && connection.to_host.len() < BUFFER_BYTES as usize);
        assert_eq!(connection.take_owed(), Some((op::CREDIT_UPDATE, 0)));
    }

    #[test]
    fn the_end_of_one_direction_leaves_the_other() {
        let (mut connection, mut there) = pair();
        connection.note_credit(1000, 0);
        there.shutdown(Shutdown::Write).unwrap();
        assert_eq!(connection.fetch(&mut [0; 10]), 0);
        assert_eq!(connection.take_owed(), Some((op::SHUTDOWN, NO_SEND)));
        assert!(connection.take(b"still"));
        connection.peer_stops(NO_SEND);
        let mut rest = Vec::new();
        there.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"still");
        assert!(!connection.take(b"more"));
    }
}

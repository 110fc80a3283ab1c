//! The thread of a socket device: carries packets between the queues and the hub, and sleeps when there are none.
//!
//! INV-VSOCK-1: guest memory and the queues are touched with the lock of [`Transfer`] held only, so that a reset or a save,
//! which takes it, finds no packet half moved. A round under the lock is bounded, and no socket of the host blocks.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::connection::BUFFER_BYTES;
use super::hub::Hub;
use super::packet::{HEADER_BYTES, Header};
use super::{EVENT, Endpoint, RECEIVE, TRANSMIT, VsockPlug};
use crate::bell::{Bell, BellThread};
use crate::bus::lock;
use crate::virtio::ActiveQueue;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Position;

/// Most packets moved in one direction before the other gets its turn.
const ROUND: usize = 64;
/// Most bytes of data in a packet for the guest; Linux's own limit is the same.
const MAX_DATA: usize = 64 << 10;
/// The longest sleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

/// What a driver that is ready has set up.
struct Driver {
    queues: [Option<ActiveQueue>; 3],
    /// The hub has not heard of it yet.
    is_new: bool,
    /// It must hear that its connections are gone.
    tell_reset: bool,
}

/// What vCPUs and the device's thread share.
#[derive(Default)]
pub(super) struct Transfer {
    driver: Mutex<Option<Driver>>,
    counters: [AtomicU64; 7],
}

const NAMES: [&str; 7] =
    ["packets_out", "bytes_out", "packets_in", "bytes_in", "connections", "connections_now", "refused"];
const PACKETS_OUT: usize = 0;
const BYTES_OUT: usize = 1;
const PACKETS_IN: usize = 2;
const BYTES_IN: usize = 3;
const OPENED: usize = 4;
const OPEN_NOW: usize = 5;
const REFUSED: usize = 6;

impl Transfer {
    pub fn begin(&self, queues: [Option<ActiveQueue>; 3], tell_reset: bool) {
        *lock(&self.driver) = Some(Driver { queues, is_new: true, tell_reset });
    }

    /// The driver is gone; nothing of guest memory is touched from here on.
    pub fn end(&self) {
        *lock(&self.driver) = None;
    }

    /// How far the queues have come.
    pub fn positions(&self) -> [Option<Position>; 3] {
        let driver = lock(&self.driver);
        let of = |queue: &Option<ActiveQueue>| queue.as_ref().map(ActiveQueue::position);
        driver.as_ref().map_or([None; 3], |driver| driver.queues.each_ref().map(of))
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        NAMES.iter().zip(&self.counters).map(|(name, value)| (*name, value.load(Ordering::Relaxed))).collect()
    }

    fn count(&self, which: usize, by: usize) {
        self.counters[which].fetch_add(by as u64, Ordering::Relaxed);
    }
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Round {
    /// There is more to do at once.
    more: bool,
    /// The guest can take packets.
    room: bool,
    is_driven: bool,
}

/// The thread, and how to wake it.
pub(super) struct Worker(BellThread);

impl Worker {
    pub fn start(name: &str, cid: u64, transfer: &Arc<Transfer>, plug: &VsockPlug) -> io::Result<Self> {
        let (transfer, plug) = (Arc::clone(transfer), Arc::clone(plug));
        let life = move |bell: &Bell| {
            // For life: a device that takes another's place waits here until that one has let go.
            let endpoint = lock(&plug);
            Life { hub: Hub::new(cid, &endpoint.path), data: vec![0; MAX_DATA], chain: Chain::default() }
                .run(bell, &transfer, &endpoint);
        };
        Ok(Self(BellThread::start(name, life)?))
    }

    /// There may be work.
    pub fn wake(&self) {
        self.0.ring();
    }

    /// Ends the thread. Idempotent.
    pub fn stop(&mut self) {
        self.0.stop();
    }
}

/// What the thread has of its own.
struct Life {
    hub: Hub,
    data: Vec<u8>,
    chain: Chain,
}

impl Life {
    fn run(mut self, bell: &Bell, transfer: &Transfer, endpoint: &Endpoint) {
        while !bell.is_stopped() {
            let round = self.round(transfer);
            self.hub.work(&endpoint.listener, round.is_driven, Instant::now());
            transfer.counters[OPENED].store(self.hub.opened, Ordering::Relaxed);
            transfer.counters[OPEN_NOW].store(self.hub.open_now() as u64, Ordering::Relaxed);
            transfer.counters[REFUSED].store(self.hub.refused, Ordering::Relaxed);
            // What the sockets brought may be for the guest.
            let is_busy = round.more || round.room && self.hub.has_news();
            if !is_busy {
                self.sleep(bell, endpoint, round.room);
            }
        }
    }

    fn sleep(&mut self, bell: &Bell, endpoint: &Endpoint, room: bool) {
        let (interests, due) = self.hub.interests(room);
        let mut list = self.hub.descriptors(&endpoint.listener, &interests);
        let limit = due.map_or(LONGEST_SLEEP, |due| due.saturating_duration_since(Instant::now()));
        bell.sleep(&mut list, limit.min(LONGEST_SLEEP));
        let said: Vec<PollFlags> = list.iter().map(rustix::event::PollFd::revents).collect();
        drop(list);
        for ((who, _), what) in interests.into_iter().zip(said) {
            self.hub.note(who, what);
        }
    }

    /// Moves packets in both directions.
    fn round(&mut self, transfer: &Transfer) -> Round {
        let mut guard = lock(&transfer.driver);
        let Some(driver) = &mut *guard else {
            self.hub.clear();
            return Round { more: false, room: false, is_driven: false };
        };
        if std::mem::take(&mut driver.is_new) {
            self.hub.clear();
        }
        driver.tell_of_reset(&mut self.chain);
        let sent = self.transmit(driver, transfer);
        let (more, room) = self.receive(driver, transfer);
        Round { more: sent || more, room, is_driven: true }
    }

    /// Takes what the driver has made available; true when there is more.
    fn transmit(&mut self, driver: &mut Driver, transfer: &Transfer) -> bool {
        let Some(queue) = &mut driver.queues[usize::from(TRANSMIT)] else { return false };
        queue.suppress();
        let mut moved = 0;
        while moved < ROUND && !self.hub.is_full() && queue.pop(&mut self.chain) {
            moved += 1;
            if let Some((header, len)) = take_packet(queue, &self.chain, &mut self.data) {
                transfer.count(PACKETS_OUT, 1);
                transfer.count(BYTES_OUT, len);
                self.hub.receive(&header, &self.data[..len]);
            }
            queue.push(self.chain.head, 0);
        }
        queue.signal();
        // A guest that takes none of its refusals waits until it does: its notification for that wakes us.
        let waits = self.hub.is_full();
        moved == ROUND || queue.listen() && !waits
    }

    /// Gives the guest what the hub has for it; whether there is more, and room for it.
    fn receive(&mut self, driver: &mut Driver, transfer: &Transfer) -> (bool, bool) {
        let Some(queue) = &mut driver.queues[usize::from(RECEIVE)] else { return (false, false) };
        let mut end = (true, true);
        for _ in 0..ROUND {
            if !queue.pop(&mut self.chain) {
                end = if queue.listen() { (true, true) } else { (false, false) };
                break;
            }
            let memory = Arc::clone(queue.memory());
            let mut to = self.chain.writer(&memory);
            let room = to.remaining().saturating_sub(HEADER_BYTES as u64);
            if to.remaining() < HEADER_BYTES as u64 {
                queue.push(self.chain.head, 0);
                continue;
            }
            let room = usize::try_from(room).unwrap_or(MAX_DATA).min(MAX_DATA);
            let Some(header) = self.hub.next(&mut self.data[..room]) else {
                queue.rewind(1);
                end = (false, true);
                break;
            };
            let len = header.len as usize;
            // A buffer outside of RAM is the guest's loss.
            let written = to.write(&header.bytes()).and_then(|head| Ok(head + to.write(&self.data[..len])?));
            queue.push(self.chain.head, written.map_or(0, |bytes| u32::try_from(bytes).unwrap_or(0)));
            transfer.count(PACKETS_IN, 1);
            transfer.count(BYTES_IN, len);
        }
        queue.signal();
        end
    }
}

impl Driver {
    fn tell_of_reset(&mut self, chain: &mut Chain) {
        let Some(queue) = self.queues[usize::from(EVENT)].as_mut().filter(|_| self.tell_reset) else {
            return;
        };
        if queue.pop(chain) {
            let memory = Arc::clone(queue.memory());
            let written = chain.writer(&memory).write(&TRANSPORT_RESET.to_le_bytes()).unwrap_or(0);
            queue.push(chain.head, u32::try_from(written).unwrap_or(0));
            queue.signal();
            self.tell_reset = false;
        } else {
            queue.listen();
        }
    }
}

/// The packet in a transmit chain: its header, and how much of `data` it filled. None for one that is cut off, too long, or not
/// in RAM.
fn take_packet(queue: &ActiveQueue, chain: &Chain, data: &mut Vec<u8>) -> Option<(Header, usize)> {
    let mut from = chain.reader(queue.memory());
    let mut raw = [0; HEADER_BYTES];
    if from.read(&mut raw) != Ok(HEADER_BYTES) {
        return None;
    }
    let header = Header::parse(&raw);
    if header.len > BUFFER_BYTES || u64::from(header.len) > from.remaining() {
        return None;
    }
    let len = header.len as usize;
    data.resize(data.len().max(len), 0);
    (from.read(&mut data[..len]) == Ok(len)).then_some((header, len))
}

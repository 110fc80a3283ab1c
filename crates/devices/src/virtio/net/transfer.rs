//! Frames between the queues and a backend (virtio 1.2 5.1.6).
//!
//! INV-NET-1: guest memory and the queues are touched with the lock held only, so that a reset or a save, which takes it,
//! finds no frame half moved. A round under the lock is bounded, and no backend blocks.
//! INV-NET-2: a received frame becomes visible to the driver whole, with all of its buffers at once; where they do not
//! suffice they are given back untouched ([`ActiveQueue::rewind`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hostnet::{Backend, Header, MAX_FRAME, Offloads};

use crate::bus::lock;
use crate::net::{Card, CardOptions, Round};
use crate::virtio::ActiveQueue;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::Position;

/// Most frames moved in one direction before the other gets its turn.
const ROUND: usize = 128;
/// The header with its number of buffers, which old drivers' lacks.
const LONG_HEADER: usize = Header::LEN + 2;

/// What a driver that is ready has set up.
pub(super) struct Driver {
    pub receive: Option<ActiveQueue>,
    pub transmit: Option<ActiveQueue>,
    /// A frame may fill several buffers.
    pub merges: bool,
    /// Length of the header before each frame, 10 or 12.
    pub header_len: usize,
    pub accepts: Offloads,
    pub interrupt: Arc<Interrupt>,
}

#[derive(Default)]
struct State {
    driver: Option<Driver>,
    /// The backend has not heard of the driver yet.
    is_new: bool,
    /// The frame under way to the guest, behind room for its header; empty when there is none.
    frame: Vec<u8>,
    chains: Vec<Chain>,
    outgoing: Vec<u8>,
    backend: Vec<(&'static str, u64)>,
}

/// What vCPUs and the card's thread share.
#[derive(Default)]
pub(super) struct Transfer {
    options: CardOptions,
    state: Mutex<State>,
    down: AtomicBool,
    sent: AtomicU64,
    bytes_out: AtomicU64,
    received: AtomicU64,
    bytes_in: AtomicU64,
    dropped: AtomicU64,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

impl Transfer {
    pub fn new(options: CardOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// A driver is ready.
    pub fn begin(&self, driver: Driver) {
        let mut state = lock(&self.state);
        state.driver = Some(driver);
        state.is_new = true;
        state.frame.clear();
    }

    /// The driver is gone; nothing of guest memory is touched from here on.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.driver = None;
        state.frame.clear();
    }

    /// How far the queues have come.
    pub fn positions(&self) -> [Option<Position>; 2] {
        let state = lock(&self.state);
        let position = |queue: &Option<ActiveQueue>| queue.as_ref().map(ActiveQueue::position);
        state.driver.as_ref().map_or([None, None], |d| [position(&d.receive), position(&d.transmit)])
    }

    pub fn is_up(&self) -> bool {
        !self.down.load(Ordering::SeqCst)
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let own = [
            ("packets_out", &self.sent),
            ("bytes_out", &self.bytes_out),
            ("packets_in", &self.received),
            ("bytes_in", &self.bytes_in),
            ("dropped", &self.dropped),
        ];
        let mut all = own.map(|(name, value)| (name, value.load(Ordering::Relaxed))).to_vec();
        all.extend(lock(&self.state).backend.iter().copied());
        all
    }
}

impl Card for Transfer {
    fn note_link(&self, up: bool) {
        if self.down.swap(!up, Ordering::SeqCst) == up
            && let Some(driver) = &lock(&self.state).driver
        {
            driver.interrupt.config_changed();
        }
    }

    fn transmit(&self, backend: &mut dyn Backend) -> Round {
        let mut guard = lock(&self.state);
        let State { driver: Some(driver), is_new, chains, outgoing, .. } = &mut *guard else {
            return Round::Idle;
        };
        if std::mem::take(is_new) {
            backend.start(driver.accepts);
        }
        let header_len = driver.header_len;
        let Some(queue) = &mut driver.transmit else { return Round::Idle };
        if chains.is_empty() {
            chains.push(Chain::default());
        }
        let chain = &mut chains[0];
        let CardOptions { combine, suppress, .. } = self.options;
        if combine {
            queue.suppress();
        }
        let mut moved = 0;
        while moved < ROUND && queue.pop(chain) {
            moved += 1;
            match take_frame(queue, chain, header_len, outgoing) {
                Some(header) => {
                    count(&self.sent, 1);
                    count(&self.bytes_out, outgoing.len());
                    backend.send(&header, outgoing);
                }
                None => count(&self.dropped, 1),
            }
            queue.push(chain.head, 0);
            if !suppress {
                queue.signal_regardless();
            }
        }
        queue.signal();
        if moved == ROUND || queue.listen() { Round::More } else { Round::Idle }
    }

    fn receive(&self, backend: &mut dyn Backend) -> Round {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        state.backend = backend.counters();
        let Some(driver) = &mut state.driver else { return Round::Idle };
        if driver.receive.is_none() {
            return Round::Idle;
        }
        let mut end = Round::More;
        for _ in 0..ROUND {
            if state.frame.is_empty() && !next_frame(backend, &mut state.frame) {
                end = Round::Idle;
                break;
            }
            match driver.deliver(&mut state.frame, &mut state.chains) {
                Delivery::Done => {
                    count(&self.received, 1);
                    count(&self.bytes_in, state.frame.len() - LONG_HEADER);
                    if let (false, Some(queue)) = (self.options.suppress, &mut driver.receive) {
                        queue.signal_regardless();
                    }
                }
                Delivery::Impossible => count(&self.dropped, 1),
                Delivery::NoRoom { seen } => {
                    let queue = driver.receive.as_mut();
                    let more = queue.is_some_and(|queue| queue.listen_beyond(seen));
                    end = if more { Round::More } else { Round::NoRoom };
                    break;
                }
            }
            state.frame.clear();
        }
        if let Some(queue) = &mut driver.receive {
            queue.signal();
        }
        end
    }
}

/// The frame in a transmit chain, and its header. None for one that is empty, too long, or not in RAM.
fn take_frame(queue: &ActiveQueue, chain: &Chain, header_len: usize, frame: &mut Vec<u8>) -> Option<Header> {
    let mut from = chain.reader(queue.memory());
    let mut raw = [0; LONG_HEADER];
    if from.read(&mut raw[..header_len]) != Ok(header_len) {
        return None;
    }
    let len = usize::try_from(from.remaining()).ok().filter(|len| (1..=MAX_FRAME).contains(len))?;
    frame.resize(len, 0);
    if from.read(frame) != Ok(len) {
        return None;
    }
    let (header, _buffers) = raw.split_at(Header::LEN);
    header.try_into().ok().map(Header::from_bytes)
}

/// Takes the backend's next frame; it lies behind its header of full length.
fn next_frame(backend: &mut dyn Backend, frame: &mut Vec<u8>) -> bool {
    frame.clear();
    frame.resize(LONG_HEADER, 0);
    match backend.receive(frame) {
        Some(header) if frame.len() <= LONG_HEADER + MAX_FRAME => {
            frame[..Header::LEN].copy_from_slice(&header.to_bytes());
            true
        }
        _ => {
            frame.clear();
            false
        }
    }
}

enum Delivery {
    Done,
    /// So many chains were seen and given back, as they do not suffice.
    NoRoom {
        seen: u16,
    },
    /// No buffer of this driver can hold it.
    Impossible,
}

impl Driver {
    /// Puts `frame` into as many buffers as it needs.
    fn deliver(&mut self, frame: &mut [u8], chains: &mut Vec<Chain>) -> Delivery {
        let Some(queue) = &mut self.receive else { return Delivery::Impossible };
        let start = LONG_HEADER - self.header_len;
        let needed = frame.len() - start;
        let most = if self.merges { usize::from(queue.size()) } else { 1 };
        let (mut taken, mut room) = (0usize, 0u64);
        while room < needed as u64 {
            if taken == most {
                rewind(queue, taken);
                return Delivery::Impossible;
            }
            if chains.len() == taken {
                chains.push(Chain::default());
            }
            if !queue.pop(&mut chains[taken]) {
                return Delivery::NoRoom { seen: rewind(queue, taken) };
            }
            room += chains[taken].writable.iter().map(|s| u64::from(s.len)).sum::<u64>();
            taken += 1;
        }
        let chains = &chains[..taken];
        set_buffers(frame, start, taken);
        let written = write_all(queue, chains, &frame[start..]);
        queue.push_all(chains.iter().zip(written).map(|(chain, len)| (chain.head, len)));
        Delivery::Done
    }
}

/// `num_buffers`, behind the ten bytes of the header; an old driver's header has none and ends where it would be.
fn set_buffers(frame: &mut [u8], start: usize, buffers: usize) {
    if start == 0 {
        let buffers = u16::try_from(buffers).unwrap_or(u16::MAX);
        frame[Header::LEN..LONG_HEADER].copy_from_slice(&buffers.to_le_bytes());
    } else {
        frame.copy_within(..Header::LEN, start);
    }
}

fn rewind(queue: &mut ActiveQueue, count: usize) -> u16 {
    // No more than the queue's size.
    let count = u16::try_from(count).unwrap_or(u16::MAX);
    queue.rewind(count);
    count
}

/// Spreads `bytes` over the chains; says how many each got. A buffer that is not RAM gets none: its driver loses the frame.
fn write_all(queue: &ActiveQueue, chains: &[Chain], mut bytes: &[u8]) -> Vec<u32> {
    let write = |chain: &Chain| {
        let mut to = chain.writer(queue.memory());
        let now = usize::try_from(to.remaining()).unwrap_or(usize::MAX).min(bytes.len());
        let (mine, rest) = bytes.split_at(now);
        bytes = rest;
        u32::try_from(to.write(mine).unwrap_or(0)).unwrap_or(0)
    };
    chains.iter().map(write).collect()
}

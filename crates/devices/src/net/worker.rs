//! The thread of a card: carries frames between card and backend, and sleeps when there are none.
//!
//! The backend lies in a slot that the thread leaves free while it sleeps, so that a vCPU that rings may do a round itself
//! ([`Worker::serve`]). INV-NETW-1: who changes what the backend waits for while the thread sleeps wakes the thread.

#![expect(unsafe_code, reason = "poll(2) on descriptors that another thread may close")]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use hostnet::{Backend, Interest, Offloads};

use super::{Card, Plug, Round};
use crate::bell::{Bell, BellThread};
use crate::bus::lock;

/// The longest sleep: what a backend forgot to ask for is looked at then.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

/// A descriptor, and the events that are waited for.
type Wish = (RawFd, libc::c_short);

/// What the thread and vCPUs share.
struct Shared {
    /// The thread sleeps or is about to: whoever has work must ring. While this is false it looks again by itself.
    sleepy: AtomicBool,
    card: Arc<dyn Card>,
    slot: Mutex<Slot>,
}

/// The backend while the card has it, and what the thread sleeps on.
#[derive(Default)]
struct Slot {
    backend: Option<Box<dyn Backend>>,
    wishes: Vec<Wish>,
    until: Option<Instant>,
}

/// Stands in the plug while a card has what was in it.
struct Taken;

impl Backend for Taken {
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    fn start(&mut self, _: Offloads) {}
    fn send(&mut self, _: &hostnet::Header, _: &[u8]) {}
    fn receive(&mut self, _: &mut Vec<u8>) -> Option<hostnet::Header> {
        None
    }
    fn sleep_on<'a>(&'a self, _: bool, _: &mut Vec<Interest<'a>>) -> Option<Duration> {
        None
    }
}

/// The thread, and how to wake it.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: BellThread,
}

impl Worker {
    pub fn start(name: &str, card: Arc<dyn Card>, plug: &Plug) -> io::Result<Self> {
        let shared = Arc::new(Shared { sleepy: AtomicBool::new(true), card, slot: Mutex::default() });
        let (mine, plug) = (Arc::clone(&shared), Arc::clone(plug));
        let thread = BellThread::start(name, move |bell| {
            // For life: a card that takes another's place waits here until that one has let go.
            let mut plugged = lock(&plug);
            lock(&mine.slot).backend = Some(std::mem::replace(&mut *plugged, Box::new(Taken)));
            mine.run(bell);
            if let Some(backend) = lock(&mine.slot).backend.take() {
                *plugged = backend;
            }
        })?;
        Ok(Self { shared, thread })
    }

    /// There may be work.
    pub fn wake(&self) {
        if self.shared.sleepy.swap(false, Ordering::SeqCst) {
            self.thread.ring();
        }
    }

    /// Does a round here, unless the thread is at it, which is woken for what is left.
    pub fn serve(&self) {
        let shared = &*self.shared;
        let mut slot = match shared.slot.try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::Poisoned(slot)) => slot.into_inner(),
            Err(TryLockError::WouldBlock) => return self.wake(),
        };
        let Some(more) = slot.round(&*shared.card) else { return self.wake() };
        let (wishes, until) = (std::mem::take(&mut slot.wishes), slot.until);
        let room = more != Some(Round::NoRoom);
        slot.wish(&*shared.card, room);
        let sooner = slot.until < until;
        // INV-NETW-1
        if more == Some(Round::More) || sooner || slot.wishes != wishes {
            drop(slot);
            self.wake();
        }
    }

    /// Ends the thread. Idempotent.
    pub fn stop(&mut self) {
        self.thread.stop();
    }
}

impl Slot {
    /// Moves what can be moved; None without a backend, then what is left.
    fn round(&mut self, card: &dyn Card) -> Option<Option<Round>> {
        let backend = self.backend.as_deref_mut()?;
        let sent = card.transmit(backend);
        backend.work();
        let received = card.receive(backend);
        card.note_link(backend.is_up());
        let more = sent == Round::More || received == Round::More;
        Some(if more { Some(Round::More) } else { (received == Round::NoRoom).then_some(received) })
    }

    /// Notes what is to be waited for.
    fn wish(&mut self, card: &dyn Card, room: bool) {
        self.wishes.clear();
        let Some(backend) = &self.backend else { return };
        let mut list = Vec::new();
        let wanted = backend.sleep_on(room, &mut list);
        let raw = |(fd, flags): &Interest<'_>| (fd.as_raw_fd(), flags.bits().cast_signed());
        self.wishes.extend(list.iter().map(raw));
        let limit = [wanted, card.deadline()].into_iter().flatten().min().unwrap_or(LONGEST_SLEEP);
        self.until = Some(Instant::now() + limit.min(LONGEST_SLEEP));
    }
}

impl Shared {
    /// The thread's life.
    fn run(&self, bell: &Bell) {
        let mut list = Vec::new();
        while !bell.is_stopped() {
            // Before the look at what there is: who has more from here on rings, and the sleep ends at once.
            self.sleepy.store(true, Ordering::SeqCst);
            let mut slot = lock(&self.slot);
            let left = slot.round(&*self.card);
            if left == Some(Some(Round::More)) {
                continue;
            }
            slot.wish(&*self.card, left != Some(Some(Round::NoRoom)));
            list.clear();
            let event = (bell.as_fd().as_raw_fd(), libc::POLLIN);
            let all = std::iter::once(&event).chain(&slot.wishes);
            list.extend(all.map(|&(fd, events)| libc::pollfd { fd, events, revents: 0 }));
            let until = slot.until;
            drop(slot);
            sleep(&mut list, until);
            bell.hush();
        }
    }
}

/// Sleeps until one of `list` is ready, or until a time. An error is a signal, or no memory: then the round is done again.
fn sleep(list: &mut [libc::pollfd], until: Option<Instant>) {
    let left = until.map_or(LONGEST_SLEEP, |until| until.saturating_duration_since(Instant::now()));
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(1),
        tv_nsec: left.subsec_nanos().into(),
    };
    let count = libc::nfds_t::try_from(list.len()).unwrap_or(0);
    // SAFETY: the list has `count` entries and lives, with `limit`, until the call returns. A descriptor that another thread
    // closes meanwhile costs a look in vain: what poll says of each is not read.
    unsafe { libc::ppoll(list.as_mut_ptr(), count, &raw const limit, std::ptr::null()) };
}

//! What the user typed and the guest has not taken yet.
//!
//! Way of the data: a terminal thread queues here → the run thread moves what devices accept ([`crate::Vm::run`]), again
//! whenever a device says that it has room. So no device is fed faster than its guest reads, and nothing is lost.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use devices::bus::lock;
use devices::chipset::i8042::{I8042, Key, key_for};
use devices::chipset::serial::Serial;

/// Bytes that wait at most.
const LIMIT: usize = 64 << 10;

/// A key of the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// A character.
    Char(char),
    /// A key without a character, pressed and released.
    Key(Key),
}

/// What the keyboard does next.
#[derive(Clone, Copy)]
enum Stroke {
    Char(char),
    Down(Key),
    Up(Key),
}

/// The queues.
#[derive(Default)]
pub(crate) struct Input {
    serial: Mutex<VecDeque<u8>>,
    keys: Mutex<VecDeque<Stroke>>,
    room: Condvar,
    waiting: AtomicBool,
}

impl Input {
    /// Queues bytes for the serial port; says how many were taken.
    pub fn serial(&self, bytes: &[u8]) -> usize {
        let mut queue = lock(&self.serial);
        let count = bytes.len().min(LIMIT - queue.len().min(LIMIT));
        queue.extend(&bytes[..count]);
        self.waiting.store(true, Ordering::SeqCst);
        count
    }

    /// Sleeps until [`Input::serial`] would take something, or `limit` has passed.
    pub fn wait_room(&self, limit: Duration) {
        let queue = lock(&self.serial);
        let full = |queue: &mut VecDeque<u8>| queue.len() >= LIMIT;
        drop(self.room.wait_timeout_while(queue, limit, full).unwrap_or_else(PoisonError::into_inner));
    }

    /// Queues keys for the keyboard; says how many were taken.
    pub fn keys(&self, keys: &[Typed]) -> usize {
        let mut queue = lock(&self.keys);
        let count = keys.len().min(LIMIT - queue.len().min(LIMIT));
        for &typed in &keys[..count] {
            match typed {
                Typed::Char(c) => queue.push_back(Stroke::Char(c)),
                Typed::Key(key) => queue.extend([Stroke::Down(key), Stroke::Up(key)]),
            }
        }
        self.waiting.store(true, Ordering::SeqCst);
        count
    }

    /// Whether anything waits (or may wait): devices ask before they wake the run thread.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Moves what the devices accept.
    pub fn feed(&self, serial: &Mutex<Serial>, keyboard: &Mutex<I8042>) {
        // `waiting` is set before the devices are tried and until all is gone: one that gets room meanwhile must not stay
        // silent. New input that comes meanwhile, even just before it is cleared, is announced by whoever queued it, and
        // that comes here again.
        self.waiting.store(true, Ordering::SeqCst);
        if !(self.feed_serial(serial) | self.feed_keyboard(keyboard)) {
            self.waiting.store(false, Ordering::SeqCst);
        }
    }

    fn feed_serial(&self, serial: &Mutex<Serial>) -> bool {
        let mut queue = lock(&self.serial);
        while !queue.is_empty() {
            let taken = lock(serial).receive(queue.as_slices().0);
            if taken == 0 {
                break;
            }
            queue.drain(..taken);
            self.room.notify_all();
        }
        !queue.is_empty()
    }

    fn feed_keyboard(&self, keyboard: &Mutex<I8042>) -> bool {
        let mut queue = lock(&self.keys);
        while let Some(&stroke) = queue.front() {
            let mut keyboard = lock(keyboard);
            let done = match stroke {
                // What no key types is dropped.
                Stroke::Char(c) => key_for(c).is_none() || keyboard.type_char(c),
                Stroke::Down(key) => keyboard.key(key, true),
                Stroke::Up(key) => keyboard.key(key, false),
            };
            if !done {
                break;
            }
            queue.pop_front();
        }
        !queue.is_empty()
    }
}

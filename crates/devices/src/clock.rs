//! All time comes from one clock that tests, snapshots and migration can steer.
//!
//! A device that wants to be called at a time holds a [`Timer`]; setting it replaces the former deadline.
//! Who runs the queue is the machine's business: a host thread that sleeps until the next deadline
//! (`--clock host`) or the vCPU loop itself, at exact instruction counts (`--clock icount`).

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Nanoseconds of guest time since the machine was powered on.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Ns(pub u64);

impl Ns {
    /// `self + ns`, saturating.
    #[must_use]
    pub const fn after(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// Ticks of a counter of `hz` that have passed at this time (exact: 128-bit arithmetic).
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "wraps after centuries")]
    pub const fn to_ticks(self, hz: u64) -> u64 {
        (self.0 as u128 * hz as u128 / 1_000_000_000) as u64
    }

    /// The first time at which a counter of `hz` shows at least `ticks`.
    #[must_use]
    pub const fn from_ticks(ticks: u64, hz: u64) -> Self {
        let ns = (ticks as u128 * 1_000_000_000).div_ceil(hz as u128);
        #[expect(clippy::cast_possible_truncation, reason = "checked")]
        Self(if ns > u64::MAX as u128 { u64::MAX } else { ns as u64 })
    }
}

/// Guest time.
pub trait Clock: Send + Sync {
    /// Guest time now.
    fn now(&self) -> Ns;
    /// Wall-clock time (UTC) now, as nanoseconds since 1970, for RTC and kvmclock.
    fn wall_ns(&self) -> u64;
    /// Frequency of the guest's time-stamp counter in Hz.
    fn tsc_hz(&self) -> u64;
    /// The guest's time-stamp counter now, before per-vCPU offsets.
    fn tsc(&self) -> u64;
    /// What [`Clock::tsc`] adds to the host's RDTSC while time passes, if it is nothing but that.
    fn tsc_delta(&self) -> Option<u64> {
        None
    }
    /// Guest time at which the counter of [`Clock::tsc`] reaches `tsc` (now or earlier if it has already).
    fn tsc_deadline(&self, tsc: u64) -> Ns;
}

/// What a timer does when its time has come. Called without queue locks; takes its device's lock itself.
pub trait TimerTarget: Send + Sync {
    /// The deadline `id` of this target has passed.
    fn fire(&self, id: u32);
}

struct Inner {
    queue: BTreeSet<(Ns, u64)>,
    entries: Vec<Entry>,
    stopped: bool,
}

struct Entry {
    deadline: Option<Ns>,
    target: Weak<dyn TimerTarget>,
    id: u32,
}

/// Pending deadlines of all devices.
pub struct TimerQueue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Default for TimerQueue {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner { queue: BTreeSet::new(), entries: Vec::new(), stopped: false }),
            changed: Condvar::new(),
        }
    }
}

/// One deadline of one device.
pub struct Timer {
    queue: Arc<TimerQueue>,
    slot: usize,
}

impl TimerQueue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new, unset timer that calls `target.fire(id)`.
    pub fn timer(self: &Arc<Self>, target: Weak<dyn TimerTarget>, id: u32) -> Timer {
        let mut inner = self.lock();
        inner.entries.push(Entry { deadline: None, target, id });
        Timer { queue: Arc::clone(self), slot: inner.entries.len() - 1 }
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Ns> {
        self.lock().queue.first().map(|&(at, _)| at)
    }

    /// Fires every deadline at or before `now`, in order of time. Returns how many fired.
    pub fn run_due(&self, now: Ns) -> usize {
        let mut fired = 0;
        while let Some((target, id)) = self.take_due(now) {
            if let Some(target) = target.upgrade() {
                target.fire(id);
            }
            fired += 1;
        }
        fired
    }

    fn take_due(&self, now: Ns) -> Option<(Weak<dyn TimerTarget>, u32)> {
        let mut inner = self.lock();
        let &(at, slot) = inner.queue.first()?;
        if at > now {
            return None;
        }
        inner.queue.pop_first();
        let entry = inner.entries.get_mut(usize::try_from(slot).ok()?)?;
        entry.deadline = None;
        Some((Weak::clone(&entry.target), entry.id))
    }

    /// The host-clock loop: sleeps until the next deadline or a change, fires what is due, until [`TimerQueue::stop`].
    pub fn run_on(&self, clock: &dyn Clock) {
        loop {
            self.run_due(clock.now());
            let mut inner = self.lock();
            if std::mem::take(&mut inner.stopped) {
                return;
            }
            let wait = match inner.queue.first() {
                Some(&(at, _)) => at.0.saturating_sub(clock.now().0).min(1_000_000_000),
                None => 1_000_000_000,
            };
            if wait > 0 {
                let _unused = self.changed.wait_timeout(inner, std::time::Duration::from_nanos(wait));
            }
        }
    }

    /// Ends [`TimerQueue::run_on`], or the next one if none runs now.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn set(&self, slot: usize, deadline: Option<Ns>) {
        let mut inner = self.lock();
        let key = slot as u64;
        if let Some(old) = inner.entries[slot].deadline.take() {
            inner.queue.remove(&(old, key));
        }
        inner.entries[slot].deadline = deadline;
        if let Some(at) = deadline {
            inner.queue.insert((at, key));
            if inner.queue.first() == Some(&(at, key)) {
                self.changed.notify_all();
            }
        }
    }
}

impl Timer {
    /// Fires at `deadline`, instead of any deadline set before.
    pub fn set(&self, deadline: Ns) {
        self.queue.set(self.slot, Some(deadline));
    }

    /// Forgets the deadline.
    pub fn cancel(&self) {
        self.queue.set(self.slot, None);
    }
}

/// A clock that stands still until it is told otherwise: for tests.
pub struct ManualClock(std::sync::atomic::AtomicU64);

impl ManualClock {
    /// A clock that shows `ns`.
    #[must_use]
    pub const fn new(ns: u64) -> Self {
        Self(std::sync::atomic::AtomicU64::new(ns))
    }

    /// Moves the clock on by `ns`.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, std::sync::atomic::Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Ns {
        Ns(self.0.load(std::sync::atomic::Ordering::SeqCst))
    }
    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.now().0
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    fn tsc(&self) -> u64 {
        self.now().0
    }
    fn tsc_deadline(&self, tsc: u64) -> Ns {
        Ns(tsc)
    }
}

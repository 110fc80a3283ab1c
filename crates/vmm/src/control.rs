//! What stops the vCPUs: wishes of the guest, of the user and of the machine itself, in one queue that the thread in
//! [`crate::Vm::run`] works off.
//!
//! Way of an event: a device (with its lock held), a vCPU thread or a user's thread posts it → `stop` is set and every vCPU
//! is kicked → the vCPU threads return → the run thread acts on the queue with all vCPUs at rest.
//!
//! Lock order: last of all. Nothing else is locked while [`Control`]'s lock is held, but for the kicked vCPU's own.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::chipset::PowerControl;
use engine::signals::Signal;
use engine::{DebugStop, Signals};

use crate::snapshot::{Snapshot, SnapshotError};
use crate::stats::Stats;
use crate::vm::Vm;

/// The value that a guest writes to port 0xf5 to have itself saved and restored.
pub const SAVE_MARKER: u32 = 0x5a;

/// Why the vCPUs are stopped.
pub(crate) enum Event {
    /// ACPI S5.
    PowerOff,
    /// Reset by any of its ways.
    Reset,
    /// isa-debug-exit.
    DebugExit(u32),
    /// The guest asks for save, restore, continue.
    SaveMarker,
    /// This vCPU is in shutdown.
    TripleFault(usize),
    /// No event can ever come (only with `icount`).
    Stuck,
    /// An engine cannot go on, and says why.
    Failed(String),
    /// A thread is panicking; joining it tells more.
    Panic,
    /// Somebody outside wants an end.
    Quit,
    /// Statistics so far.
    Stats(Sender<Stats>),
    /// A snapshot; the machine goes on.
    Save(Sender<Result<Snapshot, SnapshotError>>),
    /// Tell that the machine stands still; it does so while [`Control::is_held`].
    Pause(Sender<()>),
    /// This vCPU stopped for the debugger.
    Debug(usize, DebugStop),
    /// Something to be done with the vCPUs at rest.
    Order(Order),
}

/// What a debugger wants done with the machine.
pub(crate) type Order = Box<dyn FnOnce(&mut Vm) + Send>;

impl Event {
    /// Whether somebody waits for an answer.
    const fn is_request(&self) -> bool {
        matches!(self, Self::Stats(_) | Self::Save(_) | Self::Pause(_) | Self::Order(_))
    }

    /// Whether it is acted on while the machine stands still; the others wait.
    const fn acts_in_pause(&self) -> bool {
        self.is_request() || matches!(self, Self::Quit | Self::Panic | Self::Failed(_) | Self::Debug(..))
    }

    /// Whether it was caused by the machine, and so means nothing to its successor.
    const fn is_the_guests(&self) -> bool {
        matches!(
            self,
            Self::PowerOff
                | Self::Reset
                | Self::DebugExit(_)
                | Self::SaveMarker
                | Self::TripleFault(_)
                | Self::Stuck
                | Self::Debug(..)
        )
    }
}

/// Why [`Control::wait`] returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Woken {
    /// There is an event: the vCPUs are stopping.
    Event,
    /// A device may accept input, or there is new input.
    Input,
    /// The time is over.
    Timeout,
}

#[derive(Default)]
struct Inner {
    events: VecDeque<Event>,
    input: bool,
    /// Nobody works the queue off (any more): requests are dropped, so that who waits for an answer is told.
    ended: bool,
    /// How many want the machine to stand still.
    holds: usize,
    signals: Vec<Arc<Signals>>,
}

/// The queue.
#[derive(Default)]
pub(crate) struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an event and stops the vCPUs.
    pub fn post(&self, event: Event) {
        let mut inner = self.lock();
        if inner.ended && event.is_request() {
            return;
        }
        inner.events.push_back(event);
        self.stop_all(&inner);
    }

    fn stop_all(&self, inner: &Inner) {
        self.stop.store(true, Ordering::SeqCst);
        inner.signals.iter().for_each(|s| s.raise(Signal::KICK));
        self.changed.notify_all();
    }

    /// Whether vCPU threads are to return.
    #[inline]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// From now on somebody works the queue off, or nobody does.
    pub fn set_attended(&self, attended: bool) {
        let mut inner = self.lock();
        inner.ended = !attended;
        if !attended {
            inner.events.retain(|e| !e.is_request());
        }
    }

    /// The vCPUs with these signals are about to run. False if an event waits: then they must not.
    pub fn begin(&self, signals: &[Arc<Signals>]) -> bool {
        let mut inner = self.lock();
        inner.signals = signals.to_vec();
        let free = inner.events.is_empty();
        self.stop.store(!free, Ordering::SeqCst);
        free
    }

    /// Stops the vCPUs without an event.
    pub fn halt(&self) {
        self.stop_all(&self.lock());
    }

    /// The next event.
    pub fn next(&self) -> Option<Event> {
        self.lock().events.pop_front()
    }

    /// From now on the machine stands still when it comes to rest, until [`Control::release`].
    pub fn hold(&self) {
        self.lock().holds += 1;
    }

    /// The end of a [`Control::hold`].
    pub fn release(&self) {
        let mut inner = self.lock();
        inner.holds = inner.holds.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Whether the machine is to stand still.
    pub fn is_held(&self) -> bool {
        self.lock().holds != 0
    }

    /// Sleeps until something changes, at most so long.
    pub fn wait_held(&self, limit: Duration) {
        let inner = self.lock();
        if inner.holds != 0 && !inner.events.iter().any(Event::acts_in_pause) {
            let _woken = self.changed.wait_timeout(inner, limit);
        }
    }

    /// The next event that is acted on while the machine is paused; the others wait.
    pub fn next_in_pause(&self) -> Option<Event> {
        let mut inner = self.lock();
        let at = inner.events.iter().position(Event::acts_in_pause)?;
        inner.events.remove(at)
    }

    /// The machine is replaced by a fresh one: forgets what the old one wished.
    pub fn forget_the_guests(&self) {
        self.lock().events.retain(|e| !e.is_the_guests());
    }

    /// Input came, or room for it.
    pub fn note_input(&self) {
        self.lock().input = true;
        self.changed.notify_all();
    }

    /// Sleeps until something is to be done.
    pub fn wait(&self, end: Option<Instant>) -> Woken {
        let mut inner = self.lock();
        loop {
            if !inner.events.is_empty() {
                return Woken::Event;
            }
            if std::mem::take(&mut inner.input) {
                return Woken::Input;
            }
            inner = match end {
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Woken::Timeout;
                    }
                    self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl PowerControl for Control {
    fn power_off(&self) {
        self.post(Event::PowerOff);
    }
    fn reset(&self) {
        self.post(Event::Reset);
    }
    fn debug_exit(&self, value: u32) {
        self.post(Event::DebugExit(value));
    }
    fn save_marker(&self, value: u32) {
        if value == SAVE_MARKER {
            self.post(Event::SaveMarker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_their_order_and_a_new_machine_forgets_the_old_ones() {
        let control = Control::default();
        let signals = [Arc::new(Signals::default())];
        assert!(control.begin(&signals));
        control.reset();
        control.save_marker(1);
        control.post(Event::Quit);
        assert!(control.stopping() && signals[0].has(Signal::KICK));
        assert!(!control.begin(&signals) && control.stopping());
        assert!(matches!(control.next(), Some(Event::Reset)));
        control.debug_exit(3);
        control.forget_the_guests();
        assert!(matches!(control.next(), Some(Event::Quit)));
        assert!(control.next().is_none() && control.begin(&signals) && !control.stopping());
    }

    #[test]
    fn wait_reports_input_once_and_time_out() {
        let control = Control::default();
        control.note_input();
        assert_eq!(control.wait(None), Woken::Input);
        assert_eq!(control.wait(Some(Instant::now())), Woken::Timeout);
    }
}

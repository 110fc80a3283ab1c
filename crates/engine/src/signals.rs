//! What the outside world says to a vCPU: one word of flags that the engine polls, and a way to wake it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Bits of the pending word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Signal(pub u32);

impl Signal {
    /// The interrupt controllers have an interrupt for the vCPU.
    pub const INTERRUPT: Self = Self(1);
    /// A non-maskable interrupt.
    pub const NMI: Self = Self(2);
    /// INIT.
    pub const INIT: Self = Self(4);
    /// Start-up IPI; its vector stands in bits 24–31.
    pub const SIPI: Self = Self(8);
    /// Leave the guest and return [`crate::VcpuExit::Kicked`].
    pub const KICK: Self = Self(16);
    /// Remembered translations have to be given up (see `guestmem::Holder`).
    pub const INVALIDATE: Self = Self(32);
}

/// Something that translated code polls, cheaper to look at than the pending word.
pub trait Alarm: Send + Sync {
    /// A signal was raised.
    fn ring(&self);
}

/// The signals of one vCPU.
#[derive(Default)]
pub struct Signals {
    alarm: OnceLock<Arc<dyn Alarm>>,
    pending: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Signals {
    /// The pending word; zero means nothing to do. One relaxed load: the engine's poll.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Address of the pending word, for polls by generated code. Valid as long as `self` is.
    pub fn address(&self) -> u64 {
        self.pending.as_ptr() as u64
    }

    /// From now on `alarm` rings with every signal. Once only.
    pub fn set_alarm(&self, alarm: Arc<dyn Alarm>) {
        let _first = self.alarm.set(alarm);
    }

    /// Whether `signal` is pending.
    #[inline(always)]
    pub fn has(&self, signal: Signal) -> bool {
        self.pending.load(Ordering::Acquire) & signal.0 != 0
    }

    /// Raises a signal and wakes the vCPU if it sleeps. When this returns the alarm rings, or the vCPU has silenced it and looks at the signals.
    pub fn raise(&self, signal: Signal) {
        let pending = self.pending.fetch_or(signal.0, Ordering::SeqCst);
        // Also if the signal was pending: whoever raised it may not have come to ring yet.
        if let Some(alarm) = self.alarm.get() {
            alarm.ring();
        }
        if pending & signal.0 == 0 {
            let _held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Raises a start-up IPI.
    pub fn raise_sipi(&self, vector: u8) {
        self.pending.fetch_and(0x00ff_ffff, Ordering::SeqCst);
        self.raise(Signal(Signal::SIPI.0 | u32::from(vector) << 24));
    }

    /// Clears a signal; true if it was pending.
    pub fn take(&self, signal: Signal) -> bool {
        self.pending.fetch_and(!signal.0, Ordering::SeqCst) & signal.0 != 0
    }

    /// Takes a pending start-up IPI's vector.
    pub fn take_sipi(&self) -> Option<u8> {
        let word = self.pending.fetch_and(0x00ff_ffff & !Signal::SIPI.0, Ordering::SeqCst);
        (word & Signal::SIPI.0 != 0).then_some((word >> 24) as u8)
    }

    /// Sleeps until one of the signals in `mask` is pending (or `limit` has passed).
    pub fn wait(&self, mask: u32, limit: Duration) {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let end = std::time::Instant::now() + limit;
        while self.pending.load(Ordering::SeqCst) & mask == 0 {
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return;
            }
            held = self.wake.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

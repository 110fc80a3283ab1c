//! Samples of where a vCPU's thread is: a timer of its own (timer_create(2), SIGEV_THREAD_ID) sends it SIGPROF, whose handler writes
//! down the host's RIP and what tells the guest's address.
//!
//! The handler may come at any instruction of fragments, assembly or Rust. It uses FS (Rust's, always) for a thread-local cell without a destructor, reads
//! fields of the frame by its address (not by GS, which is nobody's before the first entry), and writes to the [`Tap`]; it allocates nothing and takes no lock.
//! RSP is the host's own stack wherever fragments run; the handler's is the alternate one all the same. The kernel saves the vector registers and gives the
//! handler fresh ones. System calls go on (SA_RESTART).
//!
//! The timer runs only while [`crate::BtVcpu`] does: sleeping vCPUs are not woken.

#![expect(unsafe_code, reason = "a signal handler, timers")]

use std::cell::Cell;
use std::ffi::c_int;
use std::ptr::null;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use bt::frame;

/// Samples between two that look at them.
const ROOM: usize = 512;

/// What the engine does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Activity {
    /// Nothing: fragments run, or assembly around them.
    Fragments,
    /// An access that missed.
    Miss,
    /// An instruction for a fragment.
    Callout,
    /// What is between two entries.
    Dispatch,
    /// Translation.
    Translation,
    /// Cold code.
    Interpretation,
}

impl Activity {
    /// All of them, in order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Fragments, Self::Miss, Self::Callout, Self::Dispatch, Self::Translation, Self::Interpretation];

    /// The name in profiles.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fragments => "fragments",
            Self::Miss => "misses",
            Self::Callout => "callouts",
            Self::Dispatch => "dispatch",
            Self::Translation => "translation",
            Self::Interpretation => "interpretation",
        }
    }
}

/// A sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Host RIP.
    pub host: u64,
    /// [`frame::PAGE_RIP`].
    pub page_rip: u64,
    /// CR3.
    pub cr3: u64,
    /// What the engine did.
    pub activity: u8,
}

#[derive(Default)]
struct Slot {
    host: AtomicU64,
    page_rip: AtomicU64,
    cr3: AtomicU64,
    activity: AtomicU8,
}

/// What the handler writes to. Handler and reader are the same thread.
pub struct Tap {
    frame: u64,
    activity: AtomicU8,
    slots: Box<[Slot]>,
    used: AtomicUsize,
    lost: AtomicU64,
}

thread_local! {
    static TAP: Cell<*const Tap> = const { Cell::new(null()) };
}

impl Tap {
    fn new(frame: u64) -> Self {
        let slots = (0..ROOM).map(|_| Slot::default()).collect();
        let activity = AtomicU8::new(Activity::Dispatch as u8);
        Self { frame, activity, slots, used: AtomicUsize::new(0), lost: AtomicU64::new(0) }
    }

    /// A field of the frame.
    fn field(&self, at: i32) -> u64 {
        let address = self.frame.wrapping_add_signed(i64::from(at)) as *const u64;
        // SAFETY: the frame is mapped as long as the vCPU lives, which takes this back from its thread before it ends; fields are aligned.
        unsafe { address.read_volatile() }
    }

    fn take(&self, host: u64) {
        let n = self.used.load(Ordering::Relaxed);
        let Some(slot) = self.slots.get(n) else {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        slot.host.store(host, Ordering::Relaxed);
        slot.page_rip.store(self.field(frame::PAGE_RIP), Ordering::Relaxed);
        slot.cr3.store(self.field(frame::CR3), Ordering::Relaxed);
        slot.activity.store(self.activity.load(Ordering::Relaxed), Ordering::Relaxed);
        self.used.store(n + 1, Ordering::Release);
        if n == ROOM / 2 {
            let alarm = self.frame.wrapping_add_signed(i64::from(frame::ALARM)) as *const AtomicUsize;
            // SAFETY: as above; everybody reaches the field through an atomic, of four bytes.
            unsafe { (*alarm.cast::<std::sync::atomic::AtomicU32>()).store(1, Ordering::SeqCst) };
        }
    }

    /// Says what the engine does from now on; what it did before.
    #[inline]
    pub fn set(&self, activity: u8) -> u8 {
        let before = self.activity.load(Ordering::Relaxed);
        self.activity.store(activity, Ordering::Relaxed);
        before
    }

    /// Takes the samples out, and how many were lost.
    pub fn drain(&self) -> (Vec<Sample>, u64) {
        let mut samples = Vec::with_capacity(ROOM);
        loop {
            // The handler may add some meanwhile.
            let n = self.used.load(Ordering::Acquire).min(self.slots.len());
            samples.extend(self.slots[samples.len().min(n)..n].iter().map(|slot| Sample {
                host: slot.host.load(Ordering::Relaxed),
                page_rip: slot.page_rip.load(Ordering::Relaxed),
                cr3: slot.cr3.load(Ordering::Relaxed),
                activity: slot.activity.load(Ordering::Relaxed),
            }));
            if self.used.compare_exchange(n, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return (samples, self.lost.swap(0, Ordering::Relaxed));
            }
        }
    }

    /// Whether there are any.
    pub fn has_samples(&self) -> bool {
        self.used.load(Ordering::Relaxed) != 0
    }
}

extern "C" fn handler(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context to an SA_SIGINFO handler.
    let rip = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let tap = TAP.get();
    // SAFETY: whoever set the pointer takes it back before the tap ends, on this thread.
    if let Some(tap) = unsafe { tap.as_ref() } {
        tap.take(rip.cast_unsigned());
    }
}

/// Sets the handler, once in the process.
fn install() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
        // SAFETY: a zeroed `sigaction` is a valid value of this plain struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the handler has the signature that SA_SIGINFO wants, and is safe at any instruction (module documentation).
        unsafe { libc::sigaction(libc::SIGPROF, &raw const action, std::ptr::null_mut()) == 0 }
    })
}

/// A vCPU's tap with its timer.
pub struct Sampler {
    // A pointer to it is in its thread's cell.
    tap: Box<Tap>,
    period_ns: i64,
    /// The thread that the timer is for, and the timer.
    timer: Option<(libc::pid_t, libc::timer_t)>,
}

// SAFETY: a timer's name is good in the whole process; the tap is made of atomics.
unsafe impl Send for Sampler {}

impl Sampler {
    /// Samples a vCPU whose frame lies at this host address so often a second. None: the handler cannot be set.
    pub fn new(frame: u64, hz: u32) -> Option<Self> {
        install().then(|| Self {
            tap: Box::new(Tap::new(frame)),
            period_ns: 1_000_000_000 / i64::from(hz.clamp(1, 20_000)),
            timer: None,
        })
    }

    /// The tap.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// Begins; on this thread from now on.
    pub fn begin(&mut self) {
        TAP.set(&raw const *self.tap);
        // SAFETY: asks for this thread's number.
        let thread = unsafe { libc::gettid() };
        if self.timer.is_none_or(|(of, _)| of != thread) {
            self.forget_timer();
            self.timer = new_timer(thread).map(|timer| (thread, timer));
        }
        self.set_timer(self.period_ns);
    }

    /// Ends until the next beginning.
    pub fn end(&mut self) {
        self.set_timer(0);
        TAP.set(null());
    }

    fn set_timer(&self, period_ns: i64) {
        let Some((_, timer)) = self.timer else { return };
        let period = libc::timespec { tv_sec: period_ns / 1_000_000_000, tv_nsec: period_ns % 1_000_000_000 };
        let value = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer is ours and lives.
        unsafe { libc::timer_settime(timer, 0, &raw const value, std::ptr::null_mut()) };
    }

    fn forget_timer(&mut self) {
        if let Some((_, timer)) = self.timer.take() {
            // SAFETY: as above; its name is not used again.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.forget_timer();
        if TAP.get() == &raw const *self.tap {
            TAP.set(null());
        }
    }
}

/// A timer that signals a thread of this process.
fn new_timer(thread: libc::pid_t) -> Option<libc::timer_t> {
    // SAFETY: a zeroed `sigevent` is a valid value of this plain struct.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGPROF;
    event.sigev_notify_thread_id = thread;
    let mut timer = std::ptr::null_mut();
    // SAFETY: both pointers are to values of ours.
    let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
    (made == 0).then_some(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_is_sampled_while_it_runs_and_not_after() {
        let frame = vec![0u64; 4096];
        let mut sampler = Sampler::new(frame.as_ptr() as u64, 2000).unwrap();
        sampler.begin();
        let from = std::time::Instant::now();
        while from.elapsed().as_millis() < 100 {}
        sampler.end();
        let (samples, lost) = sampler.tap().drain();
        assert!(samples.len() >= 20 && lost == 0, "{} samples, {lost} lost", samples.len());
        assert!(samples.iter().all(|s| s.activity == Activity::Dispatch as u8 && s.cr3 == 0));
        let from = std::time::Instant::now();
        while from.elapsed().as_millis() < 20 {}
        assert!(!sampler.tap().has_samples());
    }

    #[test]
    fn full_tap_counts_what_it_loses_and_rings() {
        let frame = vec![0u64; 4096];
        let tap = Tap::new(frame.as_ptr() as u64);
        (0..ROOM as u64 + 3).for_each(|n| tap.take(n));
        let (samples, lost) = tap.drain();
        assert_eq!((samples.len(), lost, samples[5].host), (ROOM, 3, 5));
        assert!(!tap.has_samples());
        let alarm = tap.field(frame::ALARM & !7) >> (8 * (frame::ALARM & 7));
        assert_eq!(alarm & 0xffff_ffff, 1);
    }
}

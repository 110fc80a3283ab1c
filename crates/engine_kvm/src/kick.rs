//! How other threads make a vCPU leave the guest: `immediate_exit` in its shared page for the case that it is about to enter, and a signal
//! to its thread for the case that it is inside (Linux `Documentation/virt/kvm/api.rst`, `KVM_CAP_IMMEDIATE_EXIT`).
//!
//! No wake-up is lost: the vCPU clears the flag before it looks at its signals, and who raises one sets the flag after it. So either the vCPU
//! sees the signal, or `KVM_RUN` sees the flag.

#![expect(unsafe_code, reason = "a signal handler, and a byte shared with the kernel")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use engine::signals::Alarm;

/// The vCPU's side that others may touch.
#[derive(Default)]
struct Shared {
    /// `immediate_exit`; None once the vCPU is gone.
    flag: Option<Flag>,
    /// The thread that is in [`Kick::enter`] and [`Kick::leave`], else 0.
    thread: libc::pid_t,
}

struct Flag(NonNull<AtomicU8>);

// SAFETY: the byte is written atomically by whoever has it, and [`Kick::forget`] takes it away before the page is unmapped.
unsafe impl Send for Flag {}

/// The alarm of one vCPU.
#[derive(Default)]
pub struct Kick(Mutex<Shared>);

/// The signal. Its handler does nothing: that it comes is enough.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: libc::c_int) {}

/// Without the handler the signal would end the process.
fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is an empty mask and no flags; the handler is an extern "C" function that touches nothing. SA_RESTART, so that
        // a system call of a device model that the signal hits goes on; KVM_RUN returns EINTR all the same.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
        }
    });
}

fn this_thread() -> libc::pid_t {
    rustix::thread::gettid().as_raw_nonzero().get()
}

impl Kick {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU whose page has its flag at `flag` is to be kicked from now on.
    pub fn attach(&self, flag: NonNull<AtomicU8>) {
        install_handler();
        self.lock().flag = Some(Flag(flag));
    }

    /// The page is about to go.
    pub fn forget(&self) {
        self.lock().flag = None;
    }

    /// The calling thread runs the vCPU until [`Kick::leave`].
    pub fn enter(&self) {
        self.lock().thread = this_thread();
    }

    /// No signal comes to this thread any more.
    pub fn leave(&self) {
        self.lock().thread = 0;
    }

    fn set(&self, shared: &Shared, value: u8) {
        if let Some(flag) = &shared.flag {
            // SAFETY: the page is mapped until `forget` (INV-KVM-2), and the lock is held.
            unsafe { flag.0.as_ref() }.store(value, Ordering::SeqCst);
        }
    }

    /// To be called before the vCPU looks at its signals.
    pub fn rearm(&self) {
        self.set(&self.lock(), 0);
    }

    /// The next `KVM_RUN` only completes the instruction that an exit interrupted.
    pub fn complete_only(&self) {
        self.set(&self.lock(), 1);
    }
}

impl Alarm for Kick {
    fn ring(&self) {
        let shared = self.lock();
        self.set(&shared, 1);
        if shared.thread != 0 && shared.thread != this_thread() {
            // SAFETY: a thread of this process that is alive: it holds `thread` until `leave`, which waits for our lock.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), shared.thread, signal()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[test]
    fn ring_sets_the_flag_until_the_vcpu_is_gone() {
        let byte = AtomicU8::new(0);
        let kick = Kick::default();
        kick.attach(NonNull::from(&byte));
        kick.ring();
        assert_eq!(byte.load(Ordering::SeqCst), 1);
        kick.rearm();
        assert_eq!(byte.load(Ordering::SeqCst), 0);
        kick.forget();
        kick.ring();
        assert_eq!(byte.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn ring_interrupts_a_thread_that_is_in_the_kernel() {
        let kick = Arc::new(Kick::default());
        install_handler();
        let inside = Arc::clone(&kick);
        let thread = std::thread::spawn(move || {
            inside.enter();
            let start = Instant::now();
            // nanosleep is not restarted after a handler ran (signal(7)).
            let long = libc::timespec { tv_sec: 20, tv_nsec: 0 };
            // SAFETY: a valid timespec; the rest is not wanted.
            let result = unsafe { libc::nanosleep(&raw const long, std::ptr::null_mut()) };
            inside.leave();
            (result, start.elapsed())
        });
        while !thread.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
            kick.ring();
        }
        let (result, took) = thread.join().unwrap();
        assert!(result == -1 && took < Duration::from_secs(20), "{took:?}");
    }
}

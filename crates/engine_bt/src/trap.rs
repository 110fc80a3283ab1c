//! RDTSC by trap (`TRELLIS_BT=rdtsc=trap`): the fragment has INT3, then the callout; SIGTRAP's handler goes on at the callout. It is
//! there to be measured against callout and in-cache emulation, as trap-and-emulate was once the only way; nobody needs it.
//!
//! The handler runs on the vCPU's thread with fragments' registers, but FS is Rust's and RSP the host's own stack: nothing of the guest
//! is in the way. It allocates nothing, takes no lock and changes nothing: behind INT3 the processor is at the callout already. It takes a signal for ours
//! only if the processor raised it, for an INT3 inside code memory that a vCPU of ours has announced (INV-TRAP-1); every other goes to
//! whoever had SIGTRAP before.

#![expect(unsafe_code, reason = "a signal handler")]

use std::ffi::c_int;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Code memories with traps at most: further ones do without.
const MAX_RANGES: usize = 64;

/// Start and end of a code memory; a free place has both 0.
struct Place {
    start: AtomicU64,
    end: AtomicU64,
}

static PLACES: [Place; MAX_RANGES] =
    [const { Place { start: AtomicU64::new(0), end: AtomicU64::new(0) } }; MAX_RANGES];
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Code memory in which INT3 leads to what stands behind it, as long as this lives.
pub struct Trapped(usize);

impl Trapped {
    /// Announces code memory. None: the handler cannot be set, or there are too many.
    pub fn new(code: &Range<u64>) -> Option<Self> {
        install()?;
        let number = PLACES.iter().position(|p| {
            p.start.compare_exchange(0, code.start, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        })?;
        PLACES[number].end.store(code.end, Ordering::SeqCst);
        Some(Self(number))
    }
}

impl Drop for Trapped {
    fn drop(&mut self) {
        PLACES[self.0].end.store(0, Ordering::SeqCst);
        PLACES[self.0].start.store(0, Ordering::SeqCst);
    }
}

fn is_ours(at: u64) -> bool {
    PLACES.iter().any(|p| (p.start.load(Ordering::SeqCst)..p.end.load(Ordering::SeqCst)).contains(&at))
}

/// Sets the handler, once in the process.
fn install() -> Option<()> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: a zeroed `sigaction` is a valid value of this plain struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only asks.
        if unsafe { libc::sigaction(libc::SIGTRAP, std::ptr::null(), &raw mut previous) } != 0 {
            return false;
        }
        // Before the handler can want it.
        if PREVIOUS.set(previous).is_err() {
            return false;
        }
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO wants, and is safe at any instruction (module documentation).
        unsafe { libc::sigaction(libc::SIGTRAP, &raw const action, std::ptr::null_mut()) == 0 }
    });
    done.then_some(())
}

extern "C" fn handler(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted context to an SA_SIGINFO handler.
    let rip = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let at = rip.cast_unsigned().wrapping_sub(1);
    // SAFETY: the kernel passes a valid siginfo.
    let by_processor = unsafe { (*info).si_code } > 0;
    // SAFETY: `at` lies in code memory, which is mapped readable while it is announced.
    if by_processor && is_ours(at) && unsafe { (at as *const u8).read() } == bt::TRAP {
        return;
    }
    forward(signal, info, context);
}

/// What would have happened without us.
fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(previous) = PREVIOUS.get() else { return };
    match previous.sa_sigaction {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            // It comes again when this handler returns, and the kernel does what it does.
            // SAFETY: sets back what was set before.
            unsafe { libc::sigaction(signal, std::ptr::from_ref(previous), std::ptr::null_mut()) };
            // SAFETY: may be called in a handler (signal-safety(7)).
            unsafe { libc::raise(signal) };
        }
        action if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: it was installed as a handler of this signature.
            let action: extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(action) };
            action(signal, info, context);
        }
        action => {
            // SAFETY: it was installed as a handler of this signature.
            let action: extern "C" fn(c_int) = unsafe { std::mem::transmute(action) };
            action(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_announced_code_is_ours() {
        let code = 0x7000_0000_0000..0x7000_0000_1000u64;
        let trapped = Trapped::new(&code).unwrap();
        assert!(is_ours(code.start) && is_ours(code.end - 1));
        assert!(!is_ours(code.end) && !is_ours(code.start - 1));
        drop(trapped);
        assert!(!is_ours(code.start));
    }
}

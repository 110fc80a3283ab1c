//! The host's time-stamp counter.

#![expect(unsafe_code, reason = "RDTSC is an unsafe intrinsic")]

/// RDTSC. Not serialising: good enough for clocks, not for measuring single instructions.
#[inline(always)]
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; a host that forbids it to programs (CR4.TSD, prctl PR_SET_TSC) ends the
    // process with SIGSEGV, which is no unsoundness.
    unsafe { core::arch::x86_64::_rdtsc() }
}

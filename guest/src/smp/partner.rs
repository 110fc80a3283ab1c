//! A second processor to talk to, for `nano.rs`.

use super::{A, PING, STOP, ap_count, clear, icr, id, join, post, start};
use crate::harness::{Verdict, ok, wait};
use core::arch::asm;
use core::sync::atomic::Ordering::SeqCst;

/// Runs `work` while the first application processor does `job`, which ends by [`STOP`].
pub fn with_partner(job: fn(usize), work: impl FnOnce() -> Verdict) -> Verdict {
    start()?;
    clear();
    post(0, job);
    ok(wait(|| A.load(SeqCst) == 1), "the other processor is at work")?;
    let result = work();
    STOP.store(1, SeqCst);
    ping();
    join(0)?;
    result
}

/// Sends the first application processor an interrupt that is counted.
pub fn ping() {
    icr(id(0), 0x4000 | PING);
}

/// How many of them arrived.
pub fn pings() -> u32 {
    ap_count(PING)
}

/// A job: runs.
pub fn spin_until_stopped(_: usize) {
    A.store(1, SeqCst);
    while STOP.load(SeqCst) == 0 {
        core::hint::spin_loop();
    }
}

/// A job: halts until it is interrupted, and interrupts the boot processor, vector 60H.
pub fn answer_until_stopped(_: usize) {
    let mut seen = pings();
    A.store(1, SeqCst);
    loop {
        unsafe { asm!("cli") };
        if STOP.load(SeqCst) != 0 {
            break;
        }
        if pings() == seen {
            unsafe { asm!("sti", "hlt") };
            continue;
        }
        seen += 1;
        icr(0, 0x4060);
    }
    unsafe { asm!("sti") };
}

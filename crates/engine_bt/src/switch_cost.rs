//! What it takes to go from translated code to Rust and back: the registers stored and loaded, and the vector registers where code that uses
//! them is left. It happens in assembly on both sides of what `account` measures, so it is measured here by itself: code that does nothing but call out, and
//! Rust that does nothing but return, some hundred times; the least of several rounds counts. Everything is in the host's caches then, which it is not
//! always where guests run: a lower bound.

#![expect(unsafe_code, reason = "runs assembly as if it were translated code")]

use std::arch::global_asm;
use std::sync::OnceLock;

use bt::frame;
use engine::host_tsc::rdtsc;
use x86_interp::vector;

use crate::exec::{Callouts, Frame, action};
use crate::fp;

/// Calls in a round.
const CALLS: u32 = 200;
const ROUNDS: usize = 12;
/// Guest RBX in the frame.
const RBX: i32 = 24;
/// Room for every state that XSAVE may write.
const AREA: usize = 16 << 10;

global_asm!(
    "trellis_bt_calibrate_callout:",
    "call qword ptr gs:[{callout}]\n.long 0",
    "dec rbx\njne trellis_bt_calibrate_callout",
    "trellis_bt_calibrate_leave:",
    "jmp qword ptr gs:[{leave}]",
    callout = const frame::CALLOUT,
    leave = const frame::LEAVE,
);

unsafe extern "C" {
    fn trellis_bt_calibrate_callout();
    fn trellis_bt_calibrate_leave();
}

/// Ticks, there and back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SwitchCost {
    /// Entering translated code and leaving it.
    pub entry: f64,
    /// A callout or a miss that comes to Rust.
    pub callout: f64,
    /// The same where the vector registers are the guest's.
    pub vector: f64,
}

impl SwitchCost {
    /// This host's.
    pub fn get() -> Self {
        static KNOWN: OnceLock<SwitchCost> = OnceLock::new();
        *KNOWN.get_or_init(|| Self::measure().unwrap_or_default())
    }

    fn measure() -> Option<Self> {
        let f = Frame::new().ok()?;
        let area = vec![0u64; AREA / 8 + 8];
        f.set(frame::FP_AREA, (area.as_ptr() as u64).next_multiple_of(64));
        fp::begin(&f, vector::host_components());
        let leave = trellis_bt_calibrate_leave as *const () as u64;
        let call = trellis_bt_calibrate_callout as *const () as u64;
        let entry = least(|| {
            // SAFETY: the code leaves at once, by the frame's own pointer; it touches no other field of the frame.
            (0..CALLS).for_each(|_| unsafe { f.enter(leave, 0, &mut Nothing(0)) });
        });
        let calls = |result| {
            least(|| {
                f.set(RBX, u64::from(CALLS));
                // SAFETY: the code calls out by the frame's own pointer until RBX is used up, and leaves; the area for vector registers is there,
                // and stays until the end of this function.
                unsafe { f.enter(call, 0, &mut Nothing(result)) };
            })
        };
        let callout = calls(0);
        let vector = if vector::host_components() & 3 == 3 { calls(action::FP) } else { callout };
        drop(area);
        Some(Self { entry, callout, vector })
    }
}

/// Ticks of one call.
fn least(mut round: impl FnMut()) -> f64 {
    let ticks = (0..ROUNDS).map(|_| {
        let from = rdtsc();
        round();
        rdtsc().saturating_sub(from)
    });
    #[expect(clippy::cast_precision_loss, reason = "some thousand ticks")]
    let least = ticks.min().unwrap_or(0) as f64;
    least / f64::from(CALLS)
}

/// Does nothing for those who call out.
struct Nothing(u64);

impl Callouts for Nothing {
    fn slow(&mut self, _site: u32) -> u64 {
        self.0
    }

    fn callout(&mut self, _site: u32) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_cost_something_and_vector_registers_more() {
        let c = SwitchCost::get();
        assert!(c.entry > 1.0 && c.callout > 1.0 && c.vector >= c.callout / 2.0, "{c:?}");
        println!("{c:?}");
    }
}

//! INTx: the level-triggered, shared interrupt pins of PCI (PCI 3.0 2.2.6, 6.2.2–6.2.4).
//!
//! Invariant INV-INTX-1: a function's contribution to its shared line is counted at most once; only changes reach the sink.

use std::sync::{Arc, Mutex, OnceLock};

use crate::bus::lock;

/// No interrupt line is connected (value of the Interrupt Line register, PCI 3.0 6.2.4).
pub const NO_WIRE: u8 = 0xff;

/// The board's shared PCI interrupt links 0–7. Callers report only changes, so the sink may count.
pub trait IntxSink: Send + Sync {
    /// One more (or one fewer) function pulls `link`.
    fn pull(&self, link: u8, asserted: bool);
}

#[derive(Default)]
struct State {
    level: bool,
    disabled: bool,
    asserted: bool,
}

/// One function's interrupt pin. Shareable across threads.
#[derive(Default)]
pub struct Intx {
    state: Mutex<State>,
    wire: OnceLock<(Arc<dyn IntxSink>, u8)>,
}

impl Intx {
    /// Drives the pin: held until the device's interrupt condition is gone. Without effect on the line while the guest
    /// disabled INTx or uses MSI or MSI-X.
    pub fn set(&self, level: bool) {
        let mut state = lock(&self.state);
        state.level = level;
        self.settle(&mut state);
    }

    /// What the device last asked for (Interrupt Status, PCI 3.0 6.2.3, which ignores the disable bit).
    pub fn level(&self) -> bool {
        lock(&self.state).level
    }

    pub(super) fn set_disabled(&self, disabled: bool) {
        let mut state = lock(&self.state);
        state.disabled = disabled;
        self.settle(&mut state);
    }

    pub(super) fn connect(&self, sink: Arc<dyn IntxSink>, link: u8) {
        // A function sits in one slot for life; a second connection would be a second `add` of the same function.
        let _ = self.wire.set((sink, link));
        self.settle(&mut lock(&self.state));
    }

    fn settle(&self, state: &mut State) {
        let Some((sink, link)) = self.wire.get() else { return };
        let asserted = state.level && !state.disabled;
        if asserted != state.asserted {
            state.asserted = asserted;
            sink.pull(*link, asserted);
        }
    }
}

//! How other threads make this vCPU give up translations (`guestmem::Holder`): its requests (INV-HOLD-1, `guestmem::Requests`) and its signals.

use std::ops::{Deref, Range};
use std::sync::Arc;

use engine::Signals;
use engine::signals::Signal;
pub use guestmem::ALL_FRAMES;
use guestmem::{Gfn, Holder, Invalidation, Request, Requests};

/// The part of a vCPU that other threads see.
pub struct VcpuHolder {
    id: u64,
    signals: Arc<Signals>,
    requests: Requests,
}

impl VcpuHolder {
    /// The holder of the vCPU with these signals; `id` is unique in its VM.
    pub fn new(id: u64, signals: Arc<Signals>) -> Self {
        Self { id, signals, requests: Requests::default() }
    }

    /// [`Requests::take`]; the signal is off.
    pub fn take(&self) -> (u64, Vec<Request>) {
        self.signals.take(Signal::INVALIDATE);
        self.requests.take()
    }

    fn signal(&self) {
        self.signals.raise(Signal::INVALIDATE);
    }
}

impl Deref for VcpuHolder {
    type Target = Requests;

    fn deref(&self) -> &Requests {
        &self.requests
    }
}

impl Holder for VcpuHolder {
    fn invalidate(&self, gfns: Range<Gfn>, what: Invalidation) {
        self.requests.ask((gfns, what), || self.signal());
    }

    fn code_changed(&self, gfn: Gfn, lines: u64) {
        self.requests.code_changed(gfn, lines, || self.signal());
    }

    fn id(&self) -> u64 {
        self.id
    }
}

//! A machine under a debugger: what is armed on which vCPU, which of them may run, and where stops are told. [`crate::gdb`]
//! is the debugger; it reaches the machine by orders ([`crate::Paused`]), which the run thread carries out with all vCPUs at
//! rest, so nothing here is shared.
//!
//! A reset or restored machine has new vCPUs: they are armed as the old ones were.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use devices::bus::lock;
use engine::{Debug, DebugStop, Vcpu};
use guestmem::GuestMemory;
use x86::CpuState;
use x86::cpuid::Feature;
use x86::paging::Paging;

use crate::gdb::Message;
use crate::handle::Paused;
use crate::vm::Vm;

/// A vCPU that stopped. The machine stands still while this lives.
pub(crate) struct Stopped {
    pub vcpu: usize,
    pub stop: DebugStop,
    pub paused: Paused,
}

/// What the debugger wants; the default is a machine without one.
#[derive(Default)]
pub(crate) struct Debugging {
    stops: Option<Sender<Message>>,
    armed: Vec<Debug>,
    frozen: Vec<bool>,
}

impl Debugging {
    /// Whether this vCPU is not to run while others do.
    pub fn is_frozen(&self, vcpu: usize) -> bool {
        self.frozen.get(vcpu).copied().unwrap_or(false)
    }

    /// Arms vCPUs.
    pub fn arm(&self, vcpus: &mut [Box<dyn Vcpu>]) {
        for (vcpu, debug) in vcpus.iter_mut().zip(&self.armed) {
            vcpu.set_debug(debug);
        }
    }

    /// Tells the debugger. If it has gone, the machine goes on.
    pub fn report(&self, vcpu: usize, stop: DebugStop, paused: Paused) {
        if let Some(stops) = &self.stops {
            let _gone = stops.send(Message::Stopped(Stopped { vcpu, stop, paused }));
        }
    }
}

/// How one vCPU is to run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub debug: Debug,
    pub frozen: bool,
}

/// Where a linear address leads.
pub(crate) struct AddressSpace {
    pub memory: Arc<GuestMemory>,
    pub paging: Paging,
    /// Addresses are cut to this.
    pub mask: u64,
}

/// For orders.
impl Vm {
    /// A debugger comes.
    pub(crate) fn attach_debugger(&mut self, stops: Sender<Message>) {
        self.debugging.stops = Some(stops);
    }

    /// It goes: the vCPUs run as if there had been none.
    pub(crate) fn detach_debugger(&mut self) {
        self.run_debugged(vec![Run::default(); self.vcpus.len()]);
        self.debugging = Debugging::default();
    }

    /// How the vCPUs are to run from now on.
    pub(crate) fn run_debugged(&mut self, runs: Vec<Run>) {
        (self.debugging.armed, self.debugging.frozen) =
            runs.into_iter().map(|run| (run.debug, run.frozen)).unzip();
        self.debugging.arm(&mut self.vcpus);
    }

    /// The state of a vCPU.
    pub(crate) fn vcpu_state(&mut self, vcpu: usize) -> Option<CpuState> {
        Some(self.vcpus.get_mut(vcpu)?.save())
    }

    /// Gives a vCPU another state.
    pub(crate) fn set_vcpu_state(&mut self, vcpu: usize, state: &CpuState) {
        if let Some(vcpu) = self.vcpus.get_mut(vcpu) {
            vcpu.restore(state);
        }
    }

    /// Memory as a vCPU sees it.
    pub(crate) fn address_space(&mut self, vcpu: usize) -> Option<AddressSpace> {
        let state = self.vcpu_state(vcpu)?;
        let model = &self.plan.model;
        let paging = Paging::new(&state, model.phys_bits(), model.has(Feature::Pdpe1gb));
        let memory = Arc::clone(&lock(&self.slot).as_ref()?.mem);
        let mask = if state.long_mode() { u64::MAX } else { u64::from(u32::MAX) };
        Some(AddressSpace { memory, paging, mask })
    }
}

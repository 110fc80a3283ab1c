//! The machine as `gdbstub` wants it: registers, memory, breakpoints, resumption. A thread of gdb's is a vCPU; thread 1 is
//! vCPU 0.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::mpsc::Sender;

use engine::debug::{Debug, WatchKind, Watchpoint};
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps, MultiThreadSingleStep,
    MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as GdbWatchKind,
};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use x86::CpuState;
use x86::state::Activity;

use super::Message;
use super::registers::{self, Layout};
use crate::debug::Run;
use crate::handle::{Paused, VmHandle};
use crate::vm::Vm;

/// More breakpoints than anybody sets, and a bound to what a client can make us keep.
const MAX_BREAKPOINTS: usize = 4096;
/// Every data access is compared with each.
const MAX_WATCHPOINTS: usize = 64;

/// x86, by number and bytes; what they mean is [`Layout`]'s business.
pub(crate) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = RegisterFile;
    type BreakpointKind = usize;
    type RegId = RegisterNumber;
}

/// The `g` packet.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct RegisterFile {
    bytes: Vec<u8>,
    pc: u64,
}

impl Registers for RegisterFile {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.pc
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().for_each(|&byte| write_byte(Some(byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

/// A register in gdb's numbering.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RegisterNumber(usize);

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        Some((Self(id), None))
    }
}

/// How gdb wants one vCPU to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// Not mentioned.
    Default,
    Continue,
    Step(std::ops::Range<u64>),
}

/// A machine with a debugger attached.
pub(crate) struct Debuggee {
    handle: VmHandle,
    /// While the machine stands still for us.
    paused: Option<Paused>,
    layout: Layout,
    cpus: usize,
    software: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
    watchpoints: Vec<Watchpoint>,
    actions: Vec<Action>,
    locked: bool,
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

/// gdb's name of a vCPU.
pub(crate) fn tid(vcpu: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu)
}

impl Debuggee {
    /// Stops the machine and attaches. `None` when it has ended.
    pub fn attach(handle: &VmHandle, stops: Sender<Message>, arch: Option<registers::Arch>) -> Option<Self> {
        let paused = handle.pause()?;
        let (cpus, long) = paused.order(move |vm| {
            vm.attach_debugger(stops);
            (vm.vcpus.len(), vm.vcpu_state(0).is_some_and(|state| state.long_mode()))
        })?;
        let seen = if long { registers::Arch::X86_64 } else { registers::Arch::I386 };
        Some(Self {
            handle: handle.clone(),
            paused: Some(paused),
            layout: Layout::new(arch.unwrap_or(seen)),
            cpus,
            software: BTreeSet::new(),
            hardware: BTreeSet::new(),
            watchpoints: Vec::new(),
            actions: Vec::new(),
            locked: false,
        })
    }

    /// Lets the machine go on as if nobody had been there.
    pub fn detach(mut self) {
        if self.paused.is_none() {
            self.paused = self.handle.pause();
        }
        let _ended = self.with(Vm::detach_debugger);
    }

    /// Stops the machine. False when it has ended.
    pub fn pause(&mut self) -> bool {
        let paused = self.handle.pause();
        let alive = paused.is_some();
        self.paused = paused;
        alive
    }

    /// A vCPU has stopped the machine.
    pub fn take(&mut self, paused: Paused) {
        self.paused = Some(paused);
    }

    /// Whether gdb knows a breakpoint of its kind "hardware" at the vCPU's RIP.
    pub fn is_hardware_breakpoint(&mut self, vcpu: usize) -> bool {
        let state = self.with(move |vm| vm.vcpu_state(vcpu)).ok().flatten();
        state.is_some_and(|s| {
            self.hardware.contains(&linear_rip(&s)) && !self.software.contains(&linear_rip(&s))
        })
    }

    /// The vCPU that is most likely of interest after an interruption: one that executes.
    pub fn busiest(&mut self) -> usize {
        let running = |vm: &mut Vm| {
            (0..vm.vcpus.len())
                .find(|&i| vm.vcpu_state(i).is_some_and(|state| state.activity == Activity::Running))
        };
        self.with(running).ok().flatten().unwrap_or(0)
    }

    fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Vm) -> R + Send + 'static,
    ) -> Result<R, TargetError<Infallible>> {
        // Without a machine every access fails; the end of the session is told by a message.
        self.paused.as_ref().and_then(|paused| paused.order(f)).ok_or(TargetError::NonFatal)
    }

    fn state(&self, tid: Tid) -> Result<CpuState, TargetError<Infallible>> {
        self.with(move |vm| vm.vcpu_state(index(tid)))?.ok_or(TargetError::NonFatal)
    }

    fn set_state(&self, tid: Tid, state: CpuState) -> TargetResult<(), Self> {
        self.with(move |vm| vm.set_vcpu_state(index(tid), &state))
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(slot) = self.actions.get_mut(index(tid)) {
            *slot = action;
        }
    }

    /// What gdb's actions mean for the vCPUs.
    fn runs(&self) -> Vec<Run> {
        let mut armed = Debug::with_breakpoints(self.software.union(&self.hardware).copied());
        armed.watchpoints.clone_from(&self.watchpoints);
        let run = |action: &Action| match action {
            Action::Default => Run { debug: armed.clone(), frozen: self.locked },
            Action::Continue => Run { debug: armed.clone(), frozen: false },
            Action::Step(range) => {
                let mut debug = armed.clone();
                debug.step = Some(range.clone());
                Run { debug, frozen: false }
            }
        };
        self.actions.iter().map(run).collect()
    }
}

fn linear_rip(state: &CpuState) -> u64 {
    let base = if state.code64() { 0 } else { state.seg[x86::state::sreg::CS].base };
    base.wrapping_add(state.rip)
}

impl Target for Debuggee {
    type Arch = X86;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl TargetDescriptionXmlOverride for Debuggee {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::NonFatal);
        }
        let rest = usize::try_from(offset).ok().and_then(|at| self.layout.xml.as_bytes().get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(length).min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let state = self.state(tid)?;
        *regs = RegisterFile { bytes: self.layout.read_all(&state), pc: state.rip };
        Ok(())
    }

    fn write_registers(&mut self, regs: &RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let mut state = self.state(tid)?;
        self.layout.write_all(&regs.bytes, &mut state).map_err(|_| TargetError::NonFatal)?;
        self.set_state(tid, state)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let len = data.len();
        let found = self.with(move |vm| Some(vm.address_space(index(tid))?.read(start, len)))?;
        let found = found.filter(|found| !found.is_empty() || len == 0).ok_or(TargetError::NonFatal)?;
        data[..found.len()].copy_from_slice(&found);
        Ok(found.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let data = data.to_vec();
        let done =
            self.with(move |vm| vm.address_space(index(tid)).is_some_and(|m| m.write(start, &data)))?;
        if done { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    #[inline(always)]
    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.cpus).for_each(|vcpu| register(tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(
        &mut self,
        tid: Tid,
        number: RegisterNumber,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let state = self.state(tid)?;
        let value = self.layout.read(number.0, &state).ok_or(TargetError::NonFatal)?;
        buf.get_mut(..value.len()).ok_or(TargetError::NonFatal)?.copy_from_slice(&value);
        Ok(value.len())
    }

    fn write_register(&mut self, tid: Tid, number: RegisterNumber, value: &[u8]) -> TargetResult<(), Self> {
        let mut state = self.state(tid)?;
        self.layout.write(number.0, value, &mut state).map_err(|_| TargetError::NonFatal)?;
        self.set_state(tid, state)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Infallible> {
        let doing = match self.state(tid).map(|state| state.activity) {
            Ok(Activity::Running) => "running",
            Ok(Activity::Halted) => "halted",
            Ok(Activity::WaitForSipi) => "not started",
            Ok(Activity::Shutdown) => "shut down",
            Err(_) => "gone",
        };
        let text = format!("CPU {} {doing}", index(tid));
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

// ---- running --------------------------------------------------------------------------------------------------

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Infallible> {
        let runs = self.runs();
        let _ended = self.with(move |vm| vm.run_debugged(runs));
        self.paused = None;
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.actions = vec![Action::Default; self.cpus];
        self.locked = false;
        Ok(())
    }

    // A signal means nothing to a CPU.
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_action(tid, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_action(tid, Action::Step(0..0));
        Ok(())
    }
}

impl MultiThreadRangeStepping for Debuggee {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> Result<(), Infallible> {
        self.set_action(tid, Action::Step(start..end));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.locked = true;
        Ok(())
    }
}

// ---- breakpoints ----------------------------------------------------------------------------------------------

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

/// Puts an address into a set of bounded size; gdb may say the same twice.
fn insert(set: &mut BTreeSet<u64>, address: u64) -> bool {
    if set.len() >= MAX_BREAKPOINTS && !set.contains(&address) {
        return false;
    }
    set.insert(address);
    true
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(insert(&mut self.software, address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.software.remove(&address))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(insert(&mut self.hardware, address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.hardware.remove(&address))
    }
}

fn watchpoint(start: u64, len_bytes: u64, kind: GdbWatchKind) -> Watchpoint {
    let kind = match kind {
        GdbWatchKind::Read => WatchKind::Read,
        GdbWatchKind::Write => WatchKind::Write,
        GdbWatchKind::ReadWrite => WatchKind::Access,
    };
    Watchpoint { start, len_bytes, kind }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, start: u64, len: u64, kind: GdbWatchKind) -> TargetResult<bool, Self> {
        let wanted = watchpoint(start, len, kind);
        if self.watchpoints.contains(&wanted) {
            return Ok(true);
        }
        let room = self.watchpoints.len() < MAX_WATCHPOINTS && len != 0;
        if room {
            self.watchpoints.push(wanted);
        }
        Ok(room)
    }

    fn remove_hw_watchpoint(&mut self, start: u64, len: u64, kind: GdbWatchKind) -> TargetResult<bool, Self> {
        let gone = watchpoint(start, len, kind);
        let before = self.watchpoints.len();
        self.watchpoints.retain(|w| *w != gone);
        Ok(self.watchpoints.len() < before)
    }
}

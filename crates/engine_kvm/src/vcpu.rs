//! One vCPU: enter, come back, ask the machine, enter again.
//!
//! Between two entries the signals of the outside are looked at, in the order of the interpreter (`x86_interp::run`). INIT and start-up IPIs
//! are ours, since there is no interrupt controller in the kernel; interrupts are handed over when the guest would take them, and a window is asked
//! for while it would not; the task priority goes to and fro in the shared page.

use std::io::ErrorKind;
use std::sync::Arc;

use engine::debug::DebugStop;
use engine::signals::Signal;
use engine::{Cause, CpuIo, ExitStats, Report, Signals, Vcpu, VcpuExit};
use kvm_bindings::{CpuId, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;
use x86::addr::Gpa;
use x86::bits::{msr, rflags};
use x86::state::{Activity, InterruptShadow, sreg};
use x86::{CpuState, Exception};
use x86_interp::system::{interrupt, msr as meaning};
use x86_interp::{Interp, Parts};

use crate::count::Counts;
use crate::debug::Armed;
use crate::error::KvmError;
use crate::exit::{self, DeviceAccess, Exit, Failure, MsrAccess, PortAccess};
use crate::fallback::Fallback;
use crate::kick::Kick;
use crate::run_page::RunPage;
use crate::transfer::{Apic, Layout, refused};
use crate::vm::KvmVm;
use crate::{cpuid, failure, msr as held, probe, raw};

/// Where the state is (INV-KVM-1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Home {
    Interp,
    Kvm,
}

/// Exits that complete one instruction; string instructions on ports have several.
const MAX_COMPLETING: u32 = 1 << 16;

/// A vCPU on KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    page: RunPage,
    kick: Arc<Kick>,
    interp: Interp,
    home: Home,
    layout: Layout,
    io: Arc<dyn CpuIo>,
    signals: Arc<Signals>,
    index: usize,
    /// The last exit's instruction is not complete before the next entry.
    incomplete: bool,
    /// The state has to go through the interpreter before the next entry.
    reload: bool,
    /// CR8 as the guest was given it.
    cr8: u64,
    /// The time-stamp offset that KVM has.
    tsc_offset: Option<u64>,
    debug: Armed,
    stats: ExitStats,
    counts: Counts,
    failure: Option<String>,
    fallback: Fallback,
    /// After `fd`, which it keeps the memory of.
    vm: Arc<KvmVm>,
}

impl KvmVcpu {
    /// A vCPU of `vm` in its reset state.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(vm: &Arc<KvmVm>, parts: Parts) -> Result<Self, KvmError> {
        let mut fd = vm.fd.create_vcpu(parts.index as u64).map_err(KvmError::refused("a new vCPU"))?;
        let entries = cpuid::entries(&parts.model, parts.index, parts.vcpus, parts.io.tsc_hz());
        let table = CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks("room for the CPUID table"))?;
        fd.set_cpuid2(&table).map_err(KvmError::refused("the CPU model"))?;
        let page = RunPage::of(&mut fd, vm.fd.run_size());
        let kick = Arc::new(Kick::default());
        kick.attach(page.exit_flag());
        parts.signals.set_alarm(Arc::clone(&kick) as _);
        Ok(Self {
            fd,
            page,
            kick,
            layout: Layout::of(&parts.model),
            io: Arc::clone(&parts.io),
            signals: Arc::clone(&parts.signals),
            index: parts.index,
            interp: Interp::new(parts),
            home: Home::Interp,
            incomplete: false,
            reload: false,
            cr8: 0,
            tsc_offset: None,
            debug: Armed::default(),
            stats: ExitStats::measuring(),
            counts: Counts::default(),
            failure: None,
            fallback: Fallback::of_environment(),
            vm: Arc::clone(vm),
        })
    }

    // ---- where the state is ---------------------------------------------------------------------------------

    fn go_to_kvm(&mut self) -> Result<(), KvmError> {
        if self.home == Home::Kvm {
            return Ok(());
        }
        let state = self.interp.save();
        let base = self.io.apic_msr_read(self.index, msr::APIC_BASE).unwrap_or(0);
        self.layout.push(&self.fd, &state, Apic { base, cr8: self.io.cr8(self.index) })?;
        self.home = Home::Kvm;
        self.counts.transfers += 1;
        Ok(())
    }

    /// The state is complete in the interpreter afterwards, with no event in flight.
    fn come_home(&mut self) -> Result<(), KvmError> {
        if self.home == Home::Interp {
            return Ok(());
        }
        self.complete()?;
        let mut state = self.interp.save();
        let events = self.layout.pull(&self.fd, &mut state)?;
        self.interp.forget_code();
        self.interp.restore(&state);
        self.home = Home::Interp;
        self.counts.transfers += 1;
        self.deliver_held(&events);
        Ok(())
    }

    /// Finishes the instruction that the last exit interrupted.
    fn complete(&mut self) -> Result<(), KvmError> {
        for _ in 0..MAX_COMPLETING {
            if !self.incomplete {
                return Ok(());
            }
            self.incomplete = false;
            self.kick.complete_only();
            match raw::run(&self.fd) {
                Ok(()) => {
                    // Halts and the like cannot come of a completion; what can is another access.
                    let _ended = self.act(self.page.exit())?;
                }
                Err(error) if is_interruption(&error) => {}
                Err(error) => return Err(refused("to complete an instruction")(error)),
            }
        }
        Ok(())
    }

    /// Events that KVM had taken over and not yet delivered are delivered by the interpreter.
    fn deliver_held(&mut self, events: &kvm_vcpu_events) {
        let cpu = self.interp.cpu();
        let exception = &events.exception;
        if exception.injected != 0 || exception.pending != 0 {
            let error = u16::try_from(exception.error_code & 0xffff).unwrap_or(0);
            let exception = match exception.has_error_code {
                0 => Exception::new(exception.nr & 31),
                _ => Exception::with_error(exception.nr & 31, error),
            };
            interrupt::deliver_exception(cpu, exception);
        }
        if events.nmi.injected != 0 {
            interrupt::deliver_nmi(cpu);
        }
        // INT n in flight begins anew.
        if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
            interrupt::deliver_acknowledged(cpu, events.interrupt.nr);
        }
        if events.nmi.pending != 0 {
            self.signals.raise(Signal::NMI);
        }
    }

    // ---- between entries ------------------------------------------------------------------------------------

    fn run_guest(&mut self) -> Result<VcpuExit, KvmError> {
        loop {
            self.kick.rearm();
            if let Some(exit) = self.attend()? {
                return Ok(exit);
            }
            self.go_to_kvm()?;
            self.set_time()?;
            self.enter()?;
            let exit = self.page.exit();
            self.counts.count(exit.reason(), &mut self.stats.meter);
            if let Some(exit) = self.act(exit)? {
                return Ok(exit);
            }
            if std::mem::take(&mut self.reload) {
                self.come_home()?;
            }
        }
    }

    /// Signals of the outside.
    fn attend(&mut self) -> Result<Option<VcpuExit>, KvmError> {
        if self.signals.has(Signal::INVALIDATE) {
            self.interp.cpu().serve_invalidations();
        }
        if self.signals.take(Signal::KICK) {
            self.stats.count(Cause::Kick);
            return Ok(Some(VcpuExit::Kicked));
        }
        if self.signals.take(Signal::INIT) {
            self.init()?;
        }
        if let Some(vector) = self.signals.take_sipi()
            && self.activity() == Activity::WaitForSipi
        {
            self.start_up(vector)?;
        }
        match self.activity() {
            Activity::Shutdown => return Ok(Some(VcpuExit::TripleFault)),
            Activity::WaitForSipi => return Ok(Some(VcpuExit::Halted)),
            Activity::Running | Activity::Halted => {}
        }
        self.take_events()?;
        if self.activity() == Activity::Halted {
            return Ok(Some(VcpuExit::Halted));
        }
        self.stop_before_entry()
    }

    /// NMIs and interrupts.
    fn take_events(&mut self) -> Result<(), KvmError> {
        if self.debug.holds_interrupts() && self.activity() == Activity::Running {
            self.page.request_window(false);
            return Ok(());
        }
        if self.signals.has(Signal::NMI) {
            self.take_nmi()?;
        }
        if self.signals.has(Signal::INTERRUPT)
            && self.takes_interrupts()
            && let Some(vector) = self.io.acknowledge_interrupt(self.index)
        {
            self.stats.count(Cause::Interrupt);
            self.counts.injections += 1;
            self.set_activity(Activity::Running);
            self.go_to_kvm()?;
            raw::interrupt(&self.fd, vector).map_err(refused("an interrupt"))?;
        }
        // Another one, or one that has to wait.
        self.page.request_window(self.signals.has(Signal::INTERRUPT));
        Ok(())
    }

    /// KVM keeps an NMI that has to wait; a halted vCPU that does not take it stays halted, and the signal pending.
    fn take_nmi(&mut self) -> Result<(), KvmError> {
        if self.activity() == Activity::Halted && self.nmi_blocked()? {
            return Ok(());
        }
        self.signals.take(Signal::NMI);
        self.stats.count(Cause::Nmi);
        self.counts.injections += 1;
        self.set_activity(Activity::Running);
        self.go_to_kvm()?;
        self.fd.nmi().map_err(KvmError::refused("an NMI"))
    }

    fn nmi_blocked(&mut self) -> Result<bool, KvmError> {
        if self.home == Home::Interp {
            return Ok(self.interp.cpu().s.nmi_blocked);
        }
        let events = self.fd.get_vcpu_events().map_err(KvmError::refused("the interrupt state"))?;
        Ok(events.nmi.masked != 0)
    }

    fn takes_interrupts(&mut self) -> bool {
        if self.home == Home::Interp {
            let cpu = self.interp.cpu();
            return cpu.system_flag(rflags::IF) && cpu.s.shadow == InterruptShadow::None;
        }
        self.page.takes_interrupts()
    }

    fn interrupt_flag(&self) -> bool {
        match self.home {
            Home::Interp => self.interp.wake_mask() & Signal::INTERRUPT.0 != 0,
            Home::Kvm => self.page.interrupt_flag(),
        }
    }

    fn activity(&mut self) -> Activity {
        self.interp.cpu().s.activity
    }

    fn set_activity(&mut self, activity: Activity) {
        let cpu = self.interp.cpu();
        cpu.s.activity = activity;
        cpu.derive_poll_mask();
    }

    /// INIT (SDM 3A 9.1.1); the bootstrap processor starts at the reset vector.
    fn init(&mut self) -> Result<(), KvmError> {
        self.stats.count(Cause::InitSipi);
        self.come_home()?;
        let mut state = self.interp.save();
        state.init();
        if self.index == 0 {
            state.activity = Activity::Running;
        }
        self.io.apic_init(self.index);
        self.interp.restore(&state);
        Ok(())
    }

    fn start_up(&mut self, vector: u8) -> Result<(), KvmError> {
        self.stats.count(Cause::InitSipi);
        self.come_home()?;
        let mut state = self.interp.save();
        state.sipi(vector);
        self.interp.restore(&state);
        Ok(())
    }

    /// KVM's offset from the host's time-stamp counter follows the machine's clock, which stands while the machine does, and the guest's own offset.
    ///
    /// DEVIATION: where the host's counter is not the clock's (not constant, or of another frequency, after a restore elsewhere), the guest's is set anew
    /// at each run, and may step by some microseconds. Where KVM keeps no offset at all (`trial`), the guest reads the host's counter: writes of
    /// IA32_TSC have no effect, and the counter goes on while the machine stands still.
    fn set_time(&mut self) -> Result<(), KvmError> {
        let own = self.interp.cpu().s.msr.tsc_offset;
        if !self.vm.has_tsc_offset {
            // The guest sees the host's counter; everything of ours that speaks of the guest's has to follow.
            let natural = self.io.tsc_delta().map_or(own, u64::wrapping_neg);
            if natural != own {
                meaning::set_tsc_offset(self.interp.cpu(), natural);
            }
            return Ok(());
        }
        let Some(delta) = self.io.tsc_delta() else {
            if self.tsc_offset.is_none() {
                self.set_counter(self.io.tsc().wrapping_add(own))?;
                self.tsc_offset = Some(0);
            }
            return Ok(());
        };
        let offset = delta.wrapping_add(own);
        if self.tsc_offset == Some(offset) {
            return Ok(());
        }
        if raw::set_tsc_offset(&self.fd, offset).is_err() {
            // Before Linux 5.16.
            self.set_counter(self.io.tsc().wrapping_add(own))?;
        }
        self.tsc_offset = Some(offset);
        Ok(())
    }

    fn set_counter(&self, value: u64) -> Result<(), KvmError> {
        let entry = kvm_bindings::kvm_msr_entry { index: msr::TSC, data: value, ..Default::default() };
        let list =
            kvm_bindings::Msrs::from_entries(&[entry]).map_err(|_| KvmError::Lacks("room for an MSR"))?;
        self.fd.set_msrs(&list).map_err(KvmError::refused("the time-stamp counter"))?;
        Ok(())
    }

    /// KVM_RUN, with the task priority before and after it.
    fn enter(&mut self) -> Result<(), KvmError> {
        self.cr8 = self.io.cr8(self.index);
        self.page.set_cr8(self.cr8);
        self.incomplete = false;
        self.counts.entries += 1;
        self.counts.handled(&mut self.stats.meter);
        let span = self.counts.enter(&mut self.stats.meter);
        let result = raw::run(&self.fd);
        self.counts.leave(span, &mut self.stats.meter);
        let cr8 = self.page.cr8() & 15;
        if cr8 != self.cr8 {
            self.io.set_cr8(self.index, cr8);
        }
        match result {
            Ok(()) => Ok(()),
            Err(error) if is_interruption(&error) => {
                self.page.set_reason_interrupted();
                Ok(())
            }
            Err(error) => Err(refused("to run the guest")(error)),
        }
    }

    // ---- after an exit --------------------------------------------------------------------------------------

    /// Does what an exit asks for. Some: the run ends.
    fn act(&mut self, exit: Exit) -> Result<Option<VcpuExit>, KvmError> {
        match exit {
            Exit::Port(access) => self.port(access),
            Exit::Device(access) => self.device(access),
            Exit::Msr(access) => self.msr(access),
            Exit::Halt => {
                self.stats.count(Cause::Halt);
                self.set_activity(Activity::Halted);
            }
            Exit::Shutdown => self.set_activity(Activity::Shutdown),
            Exit::Window | Exit::TaskPriority | Exit::Again => {}
            Exit::Debug { pc, dr6, .. } => return self.debug_exit(pc, dr6),
            Exit::Failure(Failure::Emulation { bytes, len }) if self.fallback.enabled => {
                self.interpret(&bytes[..len])?
            }
            Exit::Failure(failure) => return self.fail(&failure).map(Some),
        }
        Ok(None)
    }

    fn port(&mut self, access: PortAccess) {
        self.incomplete = true;
        let size = usize::from(access.size).clamp(1, 4);
        let count = usize::try_from(access.count).unwrap_or(0);
        for at in (0..count).map(|i| access.at.saturating_add(i * size)) {
            let mut word = [0; 4];
            if access.write {
                self.page.read(at, &mut word[..size]);
                let span = self.stats.begin(Cause::PortWrite);
                self.io.port_out(self.index, access.port, access.size, u32::from_le_bytes(word));
                self.stats.end(Cause::PortWrite, span);
            } else {
                let span = self.stats.begin(Cause::PortRead);
                word = self.io.port_in(self.index, access.port, access.size).to_le_bytes();
                self.stats.end(Cause::PortRead, span);
                self.page.write(at, &word[..size]);
            }
        }
    }

    fn device(&mut self, access: DeviceAccess) {
        self.incomplete = true;
        let mut data = access.data;
        if access.write {
            let span = self.stats.begin(Cause::MmioWrite);
            self.io.mmio_write(self.index, Gpa(access.gpa), &data[..access.len]);
            self.stats.end(Cause::MmioWrite, span);
        } else {
            let span = self.stats.begin(Cause::MmioRead);
            self.io.mmio_read(self.index, Gpa(access.gpa), &mut data[..access.len]);
            self.stats.end(Cause::MmioRead, span);
            self.page.write(exit::DEVICE_DATA, &data);
        }
    }

    fn msr(&mut self, access: MsrAccess) {
        self.incomplete = true;
        self.stats.count(Cause::Msr);
        let cpu = self.interp.cpu();
        // KVM asks for its own registers only when it refuses the value.
        let result = match (held::is_held(access.index), access.write) {
            (true, _) => Err(Exception::GP0),
            (false, true) => meaning::write(cpu, access.index, access.value).map(|()| access.value),
            (false, false) => meaning::read(cpu, access.index),
        };
        match result {
            Ok(value) => {
                self.page.write(exit::MSR_DATA, &value.to_le_bytes());
                self.page.write(exit::MSR_ERROR, &[0]);
                // CPUID shows whether the local APIC is enabled.
                self.reload |= access.write && access.index == msr::APIC_BASE;
            }
            Err(_) => self.page.write(exit::MSR_ERROR, &[1]),
        }
    }

    /// Executes an instruction that KVM cannot.
    fn interpret(&mut self, bytes: &[u8]) -> Result<(), KvmError> {
        self.come_home()?;
        let state = self.interp.save();
        let read;
        let bytes = if bytes.is_empty() {
            read = self.code_at(&state);
            &read
        } else {
            bytes
        };
        if let Some(name) = self.fallback.count(bytes, failure::code_bits(&state)) {
            tracing::warn!(
                "KVM cannot emulate {name} at RIP {:#x}; such instructions are interpreted (--stats counts them)",
                state.rip
            );
        }
        self.interp.cpu().holder.enter();
        self.interp.cpu().serve_invalidations();
        self.interp.step();
        self.interp.cpu().holder.leave();
        Ok(())
    }

    /// KVM gave up.
    fn fail(&mut self, failure: &Failure) -> Result<VcpuExit, KvmError> {
        self.come_home()?;
        let state = self.interp.save();
        let mut bytes = match failure {
            Failure::Emulation { bytes, len } => bytes[..*len].to_vec(),
            _ => Vec::new(),
        };
        if bytes.is_empty() {
            bytes = self.code_at(&state);
        }
        let software = probe::kvm().is_some_and(|kvm| kvm.is_software());
        self.failure = Some(failure::text(self.index, failure, &state, &bytes, software));
        Ok(VcpuExit::Failed)
    }

    /// The bytes at RIP, as far as their page goes. The state is at home.
    fn code_at(&mut self, state: &CpuState) -> Vec<u8> {
        let la = code_address(state);
        let Some(gfn) = self.interp.code_frame_at(la) else { return Vec::new() };
        let at = la & 0xfff;
        let mut bytes = vec![0; usize::try_from((0x1000 - at).min(15)).unwrap_or(0)];
        match self.interp.cpu().mem.read(Gpa(gfn.0 << 12 | at), &mut bytes) {
            Ok(()) => bytes,
            Err(_) => Vec::new(),
        }
    }

    // ---- a debugger -----------------------------------------------------------------------------------------

    fn debug_exit(&mut self, pc: u64, dr6: u64) -> Result<Option<VcpuExit>, KvmError> {
        let rip = self.fd.get_regs().map_err(KvmError::refused("the general registers"))?.rip;
        Ok(self.debug.stop(pc, rip, dr6).map(VcpuExit::Debug))
    }

    /// A breakpoint on the first instruction, where breakpoints are looked for by stepping.
    fn stop_before_entry(&mut self) -> Result<Option<VcpuExit>, KvmError> {
        if !self.debug.looks_by_stepping() {
            return Ok(None);
        }
        self.come_home()?;
        let state = self.interp.save();
        Ok(self.debug.stops_before(code_address(&state)).then_some(VcpuExit::Debug(DebugStop::Breakpoint)))
    }

    /// What went wrong ends the run.
    fn guarded(&mut self, result: Result<(), KvmError>) {
        if let Err(error) = result {
            self.failure.get_or_insert(format!("CPU {}: {error}", self.index));
        }
    }
}

/// Linear address of the next instruction.
fn code_address(s: &CpuState) -> u64 {
    if s.code64() { s.rip } else { s.seg[sreg::CS].base.wrapping_add(s.rip) & 0xffff_ffff }
}

fn is_interruption(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, _budget: u64) -> VcpuExit {
        if self.failure.is_some() {
            return VcpuExit::Failed;
        }
        if self.io.tsc_delta().is_none() {
            self.tsc_offset = None;
        }
        self.kick.enter();
        self.counts.start(&mut self.stats.meter);
        let result = self.run_guest();
        self.counts.handled(&mut self.stats.meter);
        self.kick.leave();
        result.unwrap_or_else(|error| {
            self.guarded(Err(error));
            VcpuExit::Failed
        })
    }

    fn save(&mut self) -> CpuState {
        let result = self.come_home();
        self.guarded(result);
        self.interp.save()
    }

    fn restore(&mut self, state: &CpuState) {
        // What KVM had under way is given up with the state it belonged to.
        let result = self.complete();
        self.guarded(result);
        self.interp.restore(state);
        self.home = Home::Interp;
    }

    fn set_debug(&mut self, debug: &engine::Debug) {
        self.debug = Armed::new(debug);
        let result = self
            .fd
            .set_guest_debug(&self.debug.request())
            .map_err(KvmError::refused("the debugger's wishes"));
        self.guarded(result);
    }

    fn wake_mask(&self) -> u32 {
        let always = Signal::INIT.0 | Signal::KICK.0 | Signal::INVALIDATE.0;
        let interp = self.interp.wake_mask();
        if interp & Signal::SIPI.0 != 0 {
            return interp;
        }
        let interrupt = if self.interrupt_flag() { Signal::INTERRUPT.0 } else { 0 };
        always | interrupt | Signal::NMI.0
    }

    fn instructions(&self) -> u64 {
        self.interp.instructions()
    }

    fn stats(&self) -> &ExitStats {
        &self.stats
    }

    fn report(&self) -> Report {
        let mut report = self.counts.report();
        self.fallback.report(&mut report);
        report
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.forget();
    }
}

//! The local APIC, one per vCPU (SDM 3A ch. 11; APM 2 ch. 16), as xAPIC and x2APIC.
//!
//! Way of the data: an interrupt message ([`Msg`]: IPI, IO-APIC, MSI) → [`Apics::deliver`] finds the destinations → each
//! [`Lapic`] takes it into IRR or signals NMI, INIT, start-up → the vCPU sees [`Lapic::has_interrupt`] and calls
//! [`Lapic::ack`] (or [`IrqRouter::ack`](super::irq_router::IrqRouter::ack), which asks the 8259 too) → EOI → the IO-APIC.
//!
//! Invariants:
//! - INV-LAPIC-1: no thread holds two LAPICs' locks, nor a LAPIC's lock while it takes the IO-APIC's. Whatever a register
//!   access causes elsewhere is collected in `Effects` and done after the lock is released.
//! - INV-LAPIC-2: `output` equals "there is something to acknowledge" whenever the lock is free, and every change of it was
//!   reported to the vCPU.
//! - INV-LAPIC-3: the armed [`Timer`] equals what the timer registers ask for whenever the lock is free.
//!
//! The timer counts at [`TIMER_HZ`] before its divider. Arbitration, the focus processor, SMI and CMCI are not modelled.

mod delivery;
mod registers;
#[cfg(test)]
pub(super) mod tests;
mod timer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use x86::addr::Gpa;

pub use delivery::{Apics, Delivery, DestMode, EoiSink, Msg};
use registers::{Effects, Registers};
pub use timer::TIMER_HZ;

use crate::bus::lock;
use crate::clock::{Clock, Ns, Timer, TimerQueue, TimerTarget};
use crate::irq::CpuSignal;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

const VERSION: u32 = 1;
/// Address of the register page after reset (SDM 3A 11.4.1).
const DEFAULT_BASE: u64 = 0xfee0_0000;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

/// The access raises a general-protection exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("general protection")]
pub struct Gp;

/// What [`Lapic::ack`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// The APIC's own vector.
    Vector(u8),
    /// An external interrupt: the 8259 has the vector.
    ExtInt,
}

/// What the CPU model says about its APIC.
#[derive(Clone, Copy, Debug)]
pub struct ApicModel {
    /// CPUID announces x2APIC.
    pub x2apic: bool,
    /// CPUID announces the TSC-deadline mode of the timer.
    pub tsc_deadline: bool,
    /// MAXPHYADDR: width of the base address.
    pub phys_bits: u8,
}

impl Default for ApicModel {
    fn default() -> Self {
        Self { x2apic: true, tsc_deadline: true, phys_bits: 46 }
    }
}

/// How the APIC is accessed now (SDM 3A 11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Disabled,
    XApic,
    X2Apic,
}

struct Inner {
    regs: Registers,
    /// Deadline the timer is set to.
    armed: Option<Ns>,
}

/// One vCPU's local APIC. Shareable across threads.
pub struct Lapic {
    id: u32,
    model: ApicModel,
    clock: Arc<dyn Clock>,
    signal: Arc<dyn CpuSignal>,
    apics: Weak<Apics>,
    timer: OnceLock<Timer>,
    inner: Mutex<Inner>,
    output: AtomicBool,
}

impl Lapic {
    fn new(
        id: u32,
        model: ApicModel,
        clock: Arc<dyn Clock>,
        timers: &Arc<TimerQueue>,
        signal: Arc<dyn CpuSignal>,
        apics: Weak<Apics>,
    ) -> Arc<Self> {
        let lapic = Arc::new(Self {
            id,
            model,
            clock,
            signal,
            apics,
            timer: OnceLock::new(),
            inner: Mutex::new(Inner { regs: Registers::new(id), armed: None }),
            output: AtomicBool::new(false),
        });
        let target: Arc<dyn TimerTarget> = Arc::<Self>::clone(&lapic);
        let _ = lapic.timer.set(timers.timer(Arc::downgrade(&target), 0));
        lapic
    }

    /// Runs `f` on the registers, restores the invariants, then does what `f` caused elsewhere.
    fn with<R>(&self, f: impl FnOnce(&mut Registers, &mut Effects) -> R) -> R {
        let mut effects = Effects::default();
        let result = {
            let mut inner = lock(&self.inner);
            let result = f(&mut inner.regs, &mut effects);
            if effects.timer_changed {
                self.arm(&mut inner);
            }
            self.update_output(&inner.regs);
            result
        };
        if effects.nmi {
            self.signal.nmi();
        }
        if effects.eoi.is_some() || effects.ipi.is_some() {
            self.send(&effects);
        }
        result
    }

    fn send(&self, effects: &Effects) {
        let Some(apics) = self.apics.upgrade() else { return };
        if let Some(vector) = effects.eoi {
            apics.broadcast_eoi(vector);
        }
        if let Some(ipi) = effects.ipi {
            apics.send_ipi(self, ipi);
        }
    }

    fn update_output(&self, regs: &Registers) {
        let pending = regs.has_interrupt();
        if self.output.swap(pending, Ordering::SeqCst) != pending {
            self.signal.interrupt_pending(pending);
        }
    }

    fn arm(&self, inner: &mut Inner) {
        let wake = inner.regs.next_wake(&*self.clock);
        if inner.armed != wake
            && let Some(timer) = self.timer.get()
        {
            inner.armed = wake;
            match wake {
                Some(at) => timer.set(at),
                None => timer.cancel(),
            }
        }
    }

    // ---- the vCPU's side ------------------------------------------------------------------------------------

    /// The initial APIC id, which is the vCPU's number.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Whether [`Lapic::ack`] would find something: a vector above the processor priority or an external interrupt.
    /// Cheap: one atomic load.
    pub fn has_interrupt(&self) -> bool {
        self.output.load(Ordering::SeqCst)
    }

    /// Takes the interrupt that the vCPU is about to enter: IRR → ISR (SDM 3A 11.8.4). External interrupts go first.
    pub fn ack(&self) -> Option<Ack> {
        self.with(|regs, _| regs.ack())
    }

    /// CR8: bits 7:4 of the task priority (SDM 3A 11.8.6).
    pub fn cr8(&self) -> u64 {
        u64::from(lock(&self.inner).regs.tpr() >> 4)
    }

    /// Writes CR8. The caller has raised #GP for bits above 3.
    pub fn set_cr8(&self, value: u64) {
        let class = (value & 0xf).to_le_bytes()[0];
        self.with(|regs, _| regs.set_tpr(class << 4));
    }

    /// Guest TSC = the clock's TSC + `offset` (wrapping): moves the TSC deadline.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.with(|regs, fx| {
            regs.timer.tsc_offset = offset;
            fx.timer_changed = true;
        });
    }

    /// The IA32_APIC_BASE MSR (0x1b).
    pub fn apic_base(&self) -> u64 {
        lock(&self.inner).regs.base
    }

    /// Where the xAPIC register page is, while there is one.
    pub fn mmio_base(&self) -> Option<Gpa> {
        let inner = lock(&self.inner);
        (inner.regs.mode() == Mode::XApic).then_some(Gpa(inner.regs.base & !0xfff))
    }

    /// Writes IA32_APIC_BASE.
    ///
    /// # Errors
    /// #GP for reserved bits and for the mode transitions that SDM 3A 11.12.5 forbids.
    pub fn set_apic_base(&self, value: u64) -> Result<(), Gp> {
        let reserved =
            !(BASE_BSP | BASE_ENABLE | self.base_mask()) & !if self.model.x2apic { BASE_X2APIC } else { 0 };
        if value & reserved != 0 {
            return Err(Gp);
        }
        let new = mode_of(value).ok_or(Gp)?;
        self.with(|regs, fx| {
            match (regs.mode(), new) {
                (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => return Err(Gp),
                (Mode::XApic | Mode::X2Apic, Mode::Disabled) => regs.init_reset(fx),
                _ => {}
            }
            regs.base = value;
            Ok(())
        })
    }

    const fn base_mask(&self) -> u64 {
        let bits = if self.model.phys_bits > 52 { 52 } else { self.model.phys_bits };
        ((1 << bits) - 1) & !0xfff
    }

    /// A read of the register page (SDM 3A table 11-1). Registers are 32 bits wide at multiples of 16.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.with(|regs, fx| {
            if regs.mode() != Mode::XApic {
                data.fill(0xff);
                return;
            }
            let mut register = None;
            for (at, byte) in (offset..).zip(data.iter_mut()) {
                let (start, lane) = (at & 0xff0, at & 0xf);
                if lane >= 4 {
                    continue;
                }
                if register.is_none_or(|(from, _)| from != start) {
                    register = Some((start, regs.mmio_read(start, &*self.clock, fx)));
                }
                *byte =
                    register.map_or(0, |(_, value)| value.to_le_bytes()[usize::try_from(lane).unwrap_or(0)]);
            }
        });
    }

    /// A write of the register page. Only accesses that begin at a register and cover it act (SDM 3A 11.4.1: others are
    /// undefined).
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let Some(&[a, b, c, d]) = data.first_chunk::<4>() else { return };
        if offset & 0xf != 0 {
            return;
        }
        self.with(|regs, fx| {
            if regs.mode() == Mode::XApic {
                regs.mmio_write(
                    offset & 0xff0,
                    u32::from_le_bytes([a, b, c, d]),
                    self.clock(),
                    self.model,
                    fx,
                );
            }
        });
    }

    fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// RDMSR of 0x800–0x8ff or IA32_TSC_DEADLINE (0x6e0).
    ///
    /// # Errors
    /// #GP when not in x2APIC mode, or no such register, or a write-only one (SDM 3A table 11-6).
    pub fn msr_read(&self, index: u32) -> Result<u64, Gp> {
        self.with(|regs, fx| match index {
            timer::MSR_TSC_DEADLINE if self.model.tsc_deadline => Ok(regs.read_deadline()),
            0x800..=0x8ff if regs.mode() == Mode::X2Apic => regs.msr_read(index, self.clock(), fx),
            _ => Err(Gp),
        })
    }

    /// WRMSR of 0x800–0x8ff or IA32_TSC_DEADLINE (0x6e0).
    ///
    /// # Errors
    /// #GP when not in x2APIC mode, or no such register, a read-only one, or a reserved bit (SDM 3A 11.12.1.2–3).
    pub fn msr_write(&self, index: u32, value: u64) -> Result<(), Gp> {
        self.with(|regs, fx| match index {
            timer::MSR_TSC_DEADLINE if self.model.tsc_deadline => {
                regs.write_deadline(value, self.clock(), fx);
                Ok(())
            }
            0x800..=0x8ff if regs.mode() == Mode::X2Apic => {
                regs.msr_write(index, value, self.clock(), self.model, fx)
            }
            _ => Err(Gp),
        })
    }

    // ---- the board's side -----------------------------------------------------------------------------------

    /// Drives LINT0 (the 8259's output) or LINT1 (NMI).
    pub fn set_lint(&self, pin: usize, level: bool) {
        self.with(|regs, fx| regs.set_lint(pin, level, fx));
    }

    /// Takes a message that is for this APIC. Says whether it did: a switched-off APIC takes no vectors.
    fn accept(&self, msg: &Msg) -> bool {
        match msg.delivery {
            Delivery::Fixed | Delivery::Lowest => {
                return self.with(|regs, fx| regs.accept(msg.vector, msg.level_triggered, fx));
            }
            Delivery::ExtInt => self.with(|regs, _| regs.latch_extint()),
            Delivery::Nmi => self.signal.nmi(),
            Delivery::Init if msg.level_triggered && !msg.assert => {} // only syncs arbitration ids
            Delivery::Init => {
                self.with(|regs, fx| regs.init_reset(fx));
                self.signal.init();
            }
            Delivery::Startup => self.signal.sipi(msg.vector),
            Delivery::Smi | Delivery::Reserved => {}
        }
        true
    }

    /// Power-on or hard reset (SDM 3A 11.4.7.1).
    pub fn reset(&self) {
        self.with(|regs, fx| {
            let (lint, tsc_offset) = (regs.lint, regs.timer.tsc_offset);
            *regs = Registers::new(self.id);
            regs.lint = lint;
            regs.timer.tsc_offset = tsc_offset;
            fx.timer_changed = true;
        });
    }

    /// What firmware leaves on the boot processor: APIC on, LINT0 passes the 8259's interrupts, LINT1 is NMI
    /// (MP 1.4 3.6.2.2, virtual wire mode).
    pub fn set_virtual_wire(&self) {
        self.with(|regs, _| regs.set_virtual_wire());
    }

    fn name(&self) -> String {
        format!("lapic.{}", self.id)
    }

    /// The state now.
    pub fn save_state(&self) -> StateBlob {
        to_blob(&self.name(), VERSION, &lock(&self.inner).regs)
    }

    /// Takes on a saved state, and tells the vCPU what is pending.
    ///
    /// # Errors
    /// When the blob does not fit; nothing changed then.
    pub fn restore_state(&self, blob: &StateBlob) -> Result<(), RestoreError> {
        let mut saved: Registers = from_blob(&self.name(), VERSION, blob)?;
        let reserved = !(BASE_BSP | BASE_ENABLE | BASE_X2APIC | self.base_mask());
        let bad_mode = mode_of(saved.base).is_none() || (saved.base & BASE_X2APIC != 0 && !self.model.x2apic);
        if saved.id != self.id || saved.base & reserved != 0 || bad_mode {
            let why = format!("id {:#x}, base {:#x}", saved.id, saved.base);
            return Err(RestoreError::Unfit { name: self.name(), why });
        }
        saved.sanitise();
        self.with(|regs, fx| {
            *regs = saved;
            fx.timer_changed = true;
        });
        Ok(())
    }
}

fn mode_of(base: u64) -> Option<Mode> {
    match (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0) {
        (false, false) => Some(Mode::Disabled),
        (true, false) => Some(Mode::XApic),
        (true, true) => Some(Mode::X2Apic),
        (false, true) => None,
    }
}

impl TimerTarget for Lapic {
    fn fire(&self, _id: u32) {
        {
            // The queue has forgotten the deadline.
            lock(&self.inner).armed = None;
        }
        self.with(|regs, fx| regs.timer_due(self.clock(), fx));
    }
}

impl Snapshot for Arc<Lapic> {
    fn save(&self) -> StateBlob {
        self.save_state()
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.restore_state(blob)
    }
}

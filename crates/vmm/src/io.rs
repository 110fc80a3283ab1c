//! The machine as its vCPUs see it ([`CpuIo`]), and the vCPUs as its interrupt controllers see them ([`CpuSignal`]).
//!
//! Way of an access: vCPU → [`MachineIo`] → the accessing vCPU's own local APIC if the address is its register page, else
//! the [`Bus`] → a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::bus::Bus;
use devices::chipset::irq_router::IrqRouter;
use devices::chipset::lapic::Lapic;
use devices::clock::Clock;
use devices::irq::CpuSignal;
use engine::io::GeneralProtection;
use engine::signals::Signal;
use engine::{CpuIo, Signals};
use x86::addr::Gpa;
use x86::bits::msr;

use crate::clock::GuestClock;
use crate::trace::{Bytes, Tracer};

/// One vCPU's signals, as its local APIC holds them.
pub(crate) struct VcpuSignal(pub Arc<Signals>);

impl CpuSignal for VcpuSignal {
    fn interrupt_pending(&self, pending: bool) {
        // The APIC calls with its lock held, so raising and taking back keep their order.
        if pending {
            self.0.raise(Signal::INTERRUPT);
        } else {
            self.0.take(Signal::INTERRUPT);
        }
    }
    fn nmi(&self) {
        self.0.raise(Signal::NMI);
    }
    fn init(&self) {
        self.0.raise(Signal::INIT);
    }
    fn sipi(&self, vector: u8) {
        self.0.raise_sipi(vector);
    }
}

/// No register page: not page-aligned, so no access matches.
const NO_PAGE: u64 = 1;

/// The whole boundary between vCPUs and devices.
pub(crate) struct MachineIo {
    bus: Arc<Bus>,
    router: Arc<IrqRouter>,
    clock: Arc<GuestClock>,
    tracer: Option<Arc<Tracer>>,
    /// By vCPU: the page of its local APIC's registers, or [`NO_PAGE`]. Only that vCPU changes it while it runs.
    apic_pages: Vec<AtomicU64>,
}

impl MachineIo {
    /// The boundary of a board.
    pub fn new(
        bus: Arc<Bus>,
        router: Arc<IrqRouter>,
        clock: Arc<GuestClock>,
        tracer: Option<Arc<Tracer>>,
    ) -> Self {
        let apic_pages = router.apics().lapics().iter().map(|_| AtomicU64::new(NO_PAGE)).collect();
        let io = Self { bus, router, clock, tracer, apic_pages };
        io.find_apics();
        io
    }

    /// After the local APICs were restored: where their registers are.
    pub fn find_apics(&self) {
        (0..self.apic_pages.len()).for_each(|vcpu| self.find_apic(vcpu));
    }

    fn find_apic(&self, vcpu: usize) {
        if let (Some(page), Some(lapic)) = (self.apic_pages.get(vcpu), self.lapic(vcpu)) {
            page.store(lapic.mmio_base().map_or(NO_PAGE, |base| base.0), Ordering::Relaxed);
        }
    }

    fn lapic(&self, vcpu: usize) -> Option<&Arc<Lapic>> {
        self.router.apics().lapic(vcpu)
    }

    /// The local APIC whose registers the vCPU sees at `gpa`.
    #[inline]
    fn apic_at(&self, vcpu: usize, gpa: Gpa) -> Option<&Arc<Lapic>> {
        let page = self.apic_pages.get(vcpu)?.load(Ordering::Relaxed);
        if gpa.page_base().0 == page { self.lapic(vcpu) } else { None }
    }

    #[inline]
    fn trace(&self, vcpu: usize, event: std::fmt::Arguments<'_>) {
        if let Some(tracer) = &self.tracer {
            tracer.line(&*self.clock, vcpu, event);
        }
    }
}

impl CpuIo for MachineIo {
    fn port_in(&self, vcpu: usize, port: u16, size: u8) -> u32 {
        let value = self.bus.port_read(port, size);
        self.trace(vcpu, format_args!("in {port:#x} {size} {value:#x}"));
        value
    }

    fn port_out(&self, vcpu: usize, port: u16, size: u8, value: u32) {
        self.trace(vcpu, format_args!("out {port:#x} {size} {value:#x}"));
        self.bus.port_write(port, size, value);
    }

    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]) {
        if let Some(lapic) = self.apic_at(vcpu, gpa) {
            lapic.mmio_read(gpa.0 & 0xfff, data);
        } else {
            self.bus.mmio_read(gpa, data);
        }
        self.trace(vcpu, format_args!("read {:#x} {} {}", gpa.0, data.len(), Bytes(data)));
    }

    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]) {
        self.trace(vcpu, format_args!("write {:#x} {} {}", gpa.0, data.len(), Bytes(data)));
        if let Some(lapic) = self.apic_at(vcpu, gpa) {
            lapic.mmio_write(gpa.0 & 0xfff, data);
        } else {
            self.bus.mmio_write(gpa, data);
        }
    }

    fn acknowledge_interrupt(&self, vcpu: usize) -> Option<u8> {
        let vector = self.router.ack(vcpu);
        match vector {
            Some(vector) => self.trace(vcpu, format_args!("interrupt {vector:#x}")),
            None => self.trace(vcpu, format_args!("interrupt gone")),
        }
        vector
    }

    fn cr8(&self, vcpu: usize) -> u64 {
        self.lapic(vcpu).map_or(0, |lapic| lapic.cr8())
    }

    fn set_cr8(&self, vcpu: usize, value: u64) {
        if let Some(lapic) = self.lapic(vcpu) {
            lapic.set_cr8(value);
        }
    }

    fn apic_msr_read(&self, vcpu: usize, index: u32) -> Result<u64, GeneralProtection> {
        let lapic = self.lapic(vcpu).ok_or(GeneralProtection)?;
        let value = match index {
            msr::APIC_BASE => Ok(lapic.apic_base()),
            _ => lapic.msr_read(index),
        };
        match &value {
            Ok(value) => self.trace(vcpu, format_args!("rdmsr {index:#x} {value:#x}")),
            Err(_) => self.trace(vcpu, format_args!("rdmsr {index:#x} refused")),
        }
        value.map_err(|_| GeneralProtection)
    }

    fn apic_msr_write(&self, vcpu: usize, index: u32, value: u64) -> Result<(), GeneralProtection> {
        let lapic = self.lapic(vcpu).ok_or(GeneralProtection)?;
        self.trace(vcpu, format_args!("wrmsr {index:#x} {value:#x}"));
        let done = match index {
            msr::APIC_BASE => lapic.set_apic_base(value),
            _ => lapic.msr_write(index, value),
        };
        if index == msr::APIC_BASE {
            self.find_apic(vcpu);
        }
        done.map_err(|_| GeneralProtection)
    }

    fn tsc(&self) -> u64 {
        self.clock.tsc()
    }

    fn tsc_delta(&self) -> Option<u64> {
        self.clock.tsc_delta()
    }

    fn tsc_hz(&self) -> u64 {
        self.clock.tsc_hz()
    }

    fn system_time_ns(&self) -> u64 {
        self.clock.now().0
    }

    fn wall_ns(&self) -> u64 {
        self.clock.wall_ns()
    }

    fn tsc_offset_changed(&self, vcpu: usize, offset: u64) {
        if let Some(lapic) = self.lapic(vcpu) {
            lapic.set_tsc_offset(offset);
        }
    }

    fn apic_init(&self, vcpu: usize) {
        // The local APIC reset itself when it took the INIT, before it told the vCPU; a second time would wipe out what came
        // in between. Its page stays where it is (SDM 3A 11.4.7.3).
        self.trace(vcpu, format_args!("init"));
    }
}

//! Virtio over PCI (virtio 1.2 section 4.1): identity, capabilities, BARs, and the life of a device from reset to
//! DRIVER_OK.
//!
//! | BAR | what |
//! |---|---|
//! | 0 | legacy ports (transitional devices only) |
//! | 1 | MSI-X table and pending bits: a vector for configuration changes and one for each queue |
//! | 4 | 0x0000 common configuration, 0x1000 ISR status, 0x2000 device configuration, 0x3000 notification |
//!
//! The notification address of queue n is 0x3000 + 4 n. ACCESS_PLATFORM is not offered: addresses are guest physical.
//! DEVIATION: a device uses memory whether or not the driver set Bus Master Enable, since old drivers forget it; MSI-X
//! does need it.

use std::sync::Arc;

use guestmem::GuestMemory;
use serde::{Deserialize, Serialize};

use super::active::ActiveQueue;
use super::interrupt::{Interrupt, InterruptState};
use super::legacy::{self, Place};
use super::queue::{Position, Queue};
use super::registers::{Action, COMMON_BYTES, Registers};
use super::{Activation, DeviceState, VirtioDevice, feature, read_config};
use crate::pci::{BarKind, FunctionState, PciDevice, PciFunction, PciIdentity};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICE_BASE: u16 = 0x1040;
const LEGACY_BAR: usize = 0;
const MSIX_BAR: usize = 1;
const MSIX_PBA: u32 = 0x800;
const MODERN_BAR: usize = 4;
const REGION_BYTES: u32 = 0x1000;
const COMMON_AT: u32 = 0;
const ISR_AT: u32 = 0x1000;
const DEVICE_AT: u32 = 0x2000;
const NOTIFY_AT: u32 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
/// Vendor-specific capability id.
const CAP_VENDOR: u8 = 9;
const STATE_VERSION: u32 = 1;

/// `cfg_type` of `struct virtio_pci_cap` (virtio 1.2 4.1.4).
mod cfg_type {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// Which drivers a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// Virtio 1.0 and later only (device ids from 0x1040).
    Modern,
    /// Also drivers from before (device ids from 0x1000, legacy ports in BAR 0).
    Transitional,
}

#[derive(Serialize, Deserialize)]
struct State {
    function: FunctionState,
    interrupt: InterruptState,
    registers: Registers,
    active: bool,
    device: DeviceState,
}

/// A virtio device in a PCI slot.
pub struct VirtioPci {
    function: PciFunction,
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<Interrupt>,
    registers: Registers,
    active: bool,
    /// Offset of the capability that is a window into the BARs.
    window: usize,
    notifications: u64,
    /// Accesses of the guest to the BARs: what each packet or request costs in exits.
    touches: u64,
}

impl VirtioPci {
    /// Puts `device` behind a PCI function; its queues lie in `memory`.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>, flavor: Flavor) -> Self {
        let mut function = PciFunction::new(identity(device.as_ref(), flavor));
        function.set_interrupt_pin(1);
        if flavor == Flavor::Transitional {
            function.add_bar(LEGACY_BAR, BarKind::Io, legacy::PORTS);
        }
        function.add_bar(MSIX_BAR, BarKind::Memory32, 0x1000);
        function.add_bar(MODERN_BAR, BarKind::Memory32, 0x4000);
        let queues = device.queue_sizes().len();
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let msix = function.add_msix(vectors, MSIX_BAR, 0, MSIX_PBA);
        let window = add_capabilities(&mut function);
        let interrupt = Arc::new(Interrupt::new(queues, Arc::clone(function.intx()), msix));
        let registers = fresh_registers(device.as_ref());
        Self {
            function,
            device,
            memory,
            interrupt,
            registers,
            active: false,
            window,
            notifications: 0,
            touches: 0,
        }
    }

    /// The device behind the transport.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// Named counters of device and transport.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("notifications", self.notifications),
            ("interrupts", self.interrupt.sent()),
            ("touches", self.touches),
        ];
        all.extend(self.device.counters());
        all
    }

    /// Finishes work in flight and makes it durable; nothing more is started. Call before the process ends.
    pub fn shutdown(&mut self) {
        self.device.shutdown();
    }

    // ---- life -----------------------------------------------------------------------------------------------

    fn reset_device(&mut self) {
        self.device.reset();
        self.interrupt.reset();
        self.registers = fresh_registers(self.device.as_ref());
        self.active = false;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::None => {}
            Action::Reset => self.reset_device(),
            Action::Activate => self.activate(&[]),
        }
    }

    /// Gives the device its queues, each from its place in `positions` on (from 0 where that says nothing).
    fn activate(&mut self, positions: &[Option<Position>]) {
        if std::mem::replace(&mut self.active, true) {
            return;
        }
        let features = self.registers.negotiated();
        let event_idx = features & feature::EVENT_IDX != 0;
        let indirect = features & feature::INDIRECT_DESC != 0;
        let mut queues = Vec::with_capacity(self.registers.queues.len());
        for (index, registers) in (0u16..).zip(&self.registers.queues) {
            let position = positions.get(usize::from(index)).copied().flatten().unwrap_or_default();
            let queue = registers
                .enabled
                .then(|| Queue::new(registers.layout, position, event_idx, indirect))
                .flatten();
            queues.push(
                queue.map(|q| {
                    ActiveQueue::new(q, index, Arc::clone(&self.memory), Arc::clone(&self.interrupt))
                }),
            );
        }
        self.interrupt.set_ready(true);
        let (memory, interrupt) = (Arc::clone(&self.memory), Arc::clone(&self.interrupt));
        self.device.activate(Activation { memory, queues, features, interrupt });
    }

    fn notify(&mut self, queue: u16) {
        self.notifications = self.notifications.wrapping_add(1);
        if self.active {
            self.device.notify(queue);
        }
    }

    // ---- the modern BAR -------------------------------------------------------------------------------------

    fn modern_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (region, at) = region(offset);
        match region {
            COMMON_AT => read_config(&self.registers.common(&self.interrupt), at, data),
            ISR_AT => {
                if at == 0
                    && let Some(first) = data.first_mut()
                {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE_AT => self.device.config_read(at, data),
            _ => {}
        }
    }

    fn modern_write(&mut self, offset: u64, data: &[u8]) {
        let (region, at) = region(offset);
        match region {
            COMMON_AT => {
                let max = self.device.queue_sizes();
                let action = self.registers.common_write(&self.interrupt, at, data, max);
                self.act(action);
            }
            DEVICE_AT => self.device.config_write(at, data),
            // Which queue: the address says it, and the value repeats it (virtio 1.2 4.1.5.2).
            NOTIFY_AT => {
                self.notify(u16::try_from(at / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(u16::MAX));
            }
            _ => {}
        }
    }

    // ---- the legacy BAR -------------------------------------------------------------------------------------

    fn legacy_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match legacy::place(offset, self.interrupt.msix_enabled()) {
            Place::Config(at) => self.device.config_read(at, data),
            Place::Header(at) => {
                read_config(&legacy::header(&self.registers, &self.interrupt), at, data);
                if at == legacy::ISR
                    && let Some(first) = data.first_mut()
                {
                    *first = self.interrupt.take_isr();
                }
            }
        }
    }

    fn legacy_write(&mut self, offset: u64, data: &[u8]) {
        match legacy::place(offset, self.interrupt.msix_enabled()) {
            Place::Config(at) => self.device.config_write(at, data),
            Place::Header(legacy::NOTIFY) => {
                // Drivers from before virtio 1.0 use queues before DRIVER_OK (virtio 1.2 3.1.2).
                self.activate(&[]);
                self.notify(super::registers::low16(super::registers::le_value(data)));
            }
            Place::Header(at) => {
                let action = legacy::write(&mut self.registers, &self.interrupt, at, data);
                self.act(action);
            }
        }
    }

    // ---- the window in configuration space (virtio 1.2 4.1.4.9) -------------------------------------------------

    /// Offset and length of the access that the window's fields ask for, if a configuration access touches its data.
    fn window_access(&self, offset: u16, len: usize) -> Option<(u64, usize)> {
        let (offset, data) = (usize::from(offset), self.window + 16);
        if offset >= data + 4 || offset + len <= data {
            return None;
        }
        let [bar] = self.function.bytes::<1>(self.window + 4);
        let at = u32::from_le_bytes(self.function.bytes(self.window + 8));
        let len = u32::from_le_bytes(self.function.bytes(self.window + 12));
        let fits = usize::from(bar) == MODERN_BAR && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len);
        fits.then_some((u64::from(at), len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.function
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((at, len)) = self.window_access(offset, data.len()) {
            let mut value = [0; 4];
            self.modern_read(at, &mut value[..len]);
            self.function.set_bytes(self.window + 16, &value);
        }
        self.function.config_read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
        if let Some((at, len)) = self.window_access(offset, data.len()) {
            let value = self.function.bytes::<4>(self.window + 16);
            self.modern_write(at, &value[..len]);
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.function.reset();
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.touches = self.touches.wrapping_add(1);
        match bar {
            MODERN_BAR => self.modern_read(offset, data),
            LEGACY_BAR => self.legacy_read(offset, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.touches = self.touches.wrapping_add(1);
        match bar {
            MODERN_BAR => self.modern_write(offset, data),
            LEGACY_BAR => self.legacy_write(offset, data),
            _ => {}
        }
    }
}

impl Snapshot for VirtioPci {
    fn save(&self) -> StateBlob {
        // The device first: what it finishes now changes the interrupt state.
        let device = self.device.save();
        let state = State {
            function: self.function.save(),
            interrupt: self.interrupt.save(),
            registers: self.registers.clone(),
            active: self.active,
            device,
        };
        to_blob(self.device.name(), STATE_VERSION, &state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: State = from_blob(self.device.name(), STATE_VERSION, blob)?;
        let unfit =
            |why: &str| RestoreError::Unfit { name: self.device.name().to_owned(), why: why.to_owned() };
        if state.registers.offered != self.registers.offered {
            return Err(unfit(&format!(
                "it was offered features {:#x}, this device offers {:#x}",
                state.registers.offered, self.registers.offered
            )));
        }
        if !state.registers.fits(self.device.queue_sizes()) || !self.interrupt.fits(&state.interrupt) {
            return Err(unfit("its queues differ"));
        }
        let before = self.function.save();
        self.function.restore(&state.function).map_err(|why| unfit(&why))?;
        if let Err(error) = self.device.restore(&state.device.data) {
            let back = self.function.restore(&before);
            debug_assert!(back.is_ok(), "a function's own state fits it");
            return Err(error);
        }
        self.registers = state.registers;
        self.interrupt.reset();
        self.interrupt.restore(&state.interrupt);
        self.active = false;
        if state.active {
            self.activate(&state.device.queues);
        }
        Ok(())
    }
}

/// The region of the modern BAR that an offset lies in, and the offset there.
fn region(offset: u64) -> (u32, u64) {
    let start = u32::try_from(offset).unwrap_or(u32::MAX) & !(REGION_BYTES - 1);
    (start, offset & u64::from(REGION_BYTES - 1))
}

fn fresh_registers(device: &dyn VirtioDevice) -> Registers {
    let offered = device.features() | feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
    Registers::new(offered & !device.withheld(), device.queue_sizes())
}

/// Virtio 1.2 4.1.2. Subsystem ids as QEMU gives them: the device id for legacy drivers, something from 0x40 on otherwise.
fn identity(device: &dyn VirtioDevice, flavor: Flavor) -> PciIdentity {
    let kind = device.kind();
    let (id, revision, subsystem) = match flavor {
        Flavor::Modern => (MODERN_DEVICE_BASE + kind.id, 1, 0x1100),
        Flavor::Transitional => (kind.transitional_id, 0, kind.id),
    };
    PciIdentity {
        vendor: VENDOR,
        device: id,
        class: kind.class,
        revision,
        subsystem_vendor: VENDOR,
        subsystem,
    }
}

/// Bytes of `struct virtio_pci_cap` after the capability's id and link.
fn capability(kind: u8, bar: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let total = u8::try_from(16 + extra.len()).unwrap_or(u8::MAX);
    let mut body = vec![total, kind, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra);
    body
}

/// Adds the five virtio capabilities; says where the window is.
fn add_capabilities(function: &mut PciFunction) -> usize {
    let bar = u8::try_from(MODERN_BAR).unwrap_or(0);
    let common = u32::try_from(COMMON_BYTES).unwrap_or(REGION_BYTES);
    let mut add = |kind, offset, len, extra: &[u8], writable: &[u8]| {
        let bar = if kind == cfg_type::PCI { 0 } else { bar };
        function.add_capability(CAP_VENDOR, &capability(kind, bar, offset, len, extra), writable)
    };
    add(cfg_type::COMMON, COMMON_AT, common, &[], &[]);
    add(cfg_type::ISR, ISR_AT, 1, &[], &[]);
    add(cfg_type::DEVICE, DEVICE_AT, REGION_BYTES, &[], &[]);
    add(cfg_type::NOTIFY, NOTIFY_AT, REGION_BYTES, &NOTIFY_MULTIPLIER.to_le_bytes(), &[]);
    // The driver may write bar, offset, length and data of the window.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    add(cfg_type::PCI, 0, 0, &[0; 4], &writable)
}

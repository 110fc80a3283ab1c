//! The host side of bus 0: who sits in which slot, configuration mechanism #1 (PCI 3.0 3.2.2.3.2) and the ECAM window
//! (PCI Express 2.0 7.2.2), BARs on the [`Bus`], and placing BARs before boot as firmware does.
//!
//! Invariant INV-PCI-2: a range is on the bus exactly while its function decodes it and nothing else does: a BAR that the
//! guest moves over RAM, the APICs, firmware or another device is simply not mapped, and appears once the place is free.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use x86::addr::Gpa;

use super::bridge::FIRMWARE_ROUTES;
use super::function::{Decode, reg};
use super::intx::IntxSink;
use super::{BarKind, Bdf, FunctionState, SharedPci};
use crate::bus::{Bus, MmioDevice, PortDevice, SharedPort, lock};
use crate::irq::IrqSink;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Where firmware places memory BARs.
pub const MMIO_HOLE: Range<u64> = 0xe000_0000..0xfec0_0000;
/// Where BARs never go: IO-APIC, HPET, local APICs, firmware.
pub const RESERVED: Range<u64> = 0xfec0_0000..0x1_0000_0000;
/// Where firmware places I/O BARs.
const IO_HOLE: Range<u64> = 0xc000..0x1_0000;
/// No guest-physical address has more bits (SDM 3A 4.1.4).
const ADDRESS_END: u64 = 1 << 52;
const COMMAND_IO_MEMORY: [u8; 2] = [3, 0];
const NAME: &str = "pci-host";
const VERSION: u32 = 1;

/// A function or BAR that cannot be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The slot is in use.
    #[error("PCI slot {:02x}.{} is taken", .0.device, .0.function)]
    Taken(Bdf),
    /// Bus 0 has 32 devices of 8 functions.
    #[error("PCI bus 0 has no slot {:02x}.{}", .0.device, .0.function)]
    NoSlot(Bdf),
    /// All 32 device numbers are in use.
    #[error("PCI bus 0 is full")]
    Full,
    /// No room for a BAR in its hole.
    #[error("no room for BAR {bar} ({len:#x} bytes) of PCI {:02x}.{}", .bdf.device, .bdf.function)]
    NoRoom {
        /// The function.
        bdf: Bdf,
        /// Its BAR.
        bar: usize,
        /// Bytes or ports asked for.
        len: u64,
    },
}

/// The interrupt link (0–7) of a function's pin (1–4): neighbouring devices use different links.
#[must_use]
pub const fn link_of_intx(device: u8, pin: u8) -> u8 {
    device.wrapping_add(pin).wrapping_sub(1) & 7
}

/// The IO-APIC input (16–23) of a function's pin (1–4): for the ACPI _PRT and the MP table.
#[must_use]
pub const fn gsi_of_intx(device: u8, pin: u8) -> u32 {
    16 + link_of_intx(device, pin) as u32
}

/// Passes accesses from the bus to a function's BAR.
struct Window {
    device: SharedPci,
    bar: usize,
}

impl MmioDevice for Window {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let mut device = lock(&self.device);
        for (at, part) in (offset..).step_by(8).zip(data.chunks_mut(8)) {
            if !device.function().msix_read(self.bar, at, part) {
                device.bar_read(self.bar, at, part);
            }
        }
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let mut device = lock(&self.device);
        for (at, part) in (offset..).step_by(8).zip(data.chunks(8)) {
            if !device.function().msix_write(self.bar, at, part) {
                device.bar_write(self.bar, at, part);
            }
        }
    }
}

impl PortDevice for Window {
    fn port_read(&mut self, offset: u16, size: u8) -> u32 {
        let mut data = [0; 4];
        let len = usize::from(size.min(4));
        self.mmio_read(u64::from(offset), &mut data[..len]);
        u32::from_le_bytes(data)
    }
    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        let len = usize::from(size.min(4));
        self.mmio_write(u64::from(offset), &value.to_le_bytes()[..len]);
    }
}

struct Slot {
    device: SharedPci,
    windows: [Arc<Mutex<Window>>; 6],
    mapped: [Option<Decode>; 6],
}

struct Inner {
    /// CONFIG_ADDRESS.
    address: u32,
    slots: BTreeMap<Bdf, Slot>,
    /// RAM, the ECAM window and whatever else the machine keeps BARs away from.
    reserved: Vec<Range<u64>>,
}

/// PCI bus 0.
pub struct PciHost {
    bus: Weak<Bus>,
    messages: Arc<dyn IrqSink>,
    pins: Arc<dyn IntxSink>,
    inner: Mutex<Inner>,
}

impl PciHost {
    /// An empty bus whose BARs appear on `bus` outside `reserved` (guest RAM) and [`RESERVED`], whose messages go to
    /// `messages` and whose interrupt pins go to `pins`.
    #[must_use]
    pub fn new(
        bus: &Arc<Bus>,
        messages: Arc<dyn IrqSink>,
        pins: Arc<dyn IntxSink>,
        mut reserved: Vec<Range<u64>>,
    ) -> Arc<Self> {
        reserved.push(RESERVED);
        Arc::new(Self {
            bus: Arc::downgrade(bus),
            messages,
            pins,
            inner: Mutex::new(Inner { address: 0, slots: BTreeMap::new(), reserved }),
        })
    }

    /// Plugs a function in: at `at`, or at function 0 of the first free device number from 2 on.
    ///
    /// # Errors
    /// When the slot does not exist or is taken.
    pub fn add(&self, at: Option<Bdf>, device: SharedPci) -> Result<Bdf, PciError> {
        let mut inner = lock(&self.inner);
        let free = || {
            let numbers = 2..32u8;
            let taken = |n: u8| inner.slots.keys().any(|b| b.device == n);
            numbers.into_iter().find(|&n| !taken(n)).map(|device| Bdf { device, function: 0 })
        };
        let bdf = at.or_else(free).ok_or(PciError::Full)?;
        if bdf.device > 31 || bdf.function > 7 {
            return Err(PciError::NoSlot(bdf));
        }
        if inner.slots.contains_key(&bdf) {
            return Err(PciError::Taken(bdf));
        }
        {
            let locked = lock(&device);
            let link = link_of_intx(bdf.device, locked.function().interrupt_pin().max(1));
            locked.function().connect(&self.messages, &self.pins, link);
        }
        let windows =
            std::array::from_fn(|bar| Arc::new(Mutex::new(Window { device: Arc::clone(&device), bar })));
        inner.slots.insert(bdf, Slot { device, windows, mapped: [None; 6] });
        self.remap_locked(&mut inner);
        Ok(bdf)
    }

    /// Where functions are plugged in.
    pub fn slots(&self) -> Vec<Bdf> {
        lock(&self.inner).slots.keys().copied().collect()
    }

    fn device(&self, bdf: Bdf) -> Option<SharedPci> {
        lock(&self.inner).slots.get(&bdf).map(|s| Arc::clone(&s.device))
    }

    /// Reads configuration space of a function; all ones where none sits. The access must not cross a dword.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        match self.device(bdf) {
            Some(device) => lock(&device).config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space of a function, and moves BARs that the write moved.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(device) = self.device(bdf) else { return };
        lock(&device).config_write(offset, data);
        // Only the command register and the BARs say where a function decodes.
        if (reg::COMMAND..reg::BAR_END).contains(&usize::from(offset)) {
            self.remap();
        }
    }

    /// Puts every BAR on the bus where its function decodes it now. Needed only after functions were changed behind the
    /// host's back (reset, restore).
    pub fn remap(&self) {
        self.remap_locked(&mut lock(&self.inner));
    }

    fn remap_locked(&self, inner: &mut Inner) {
        let Some(bus) = self.bus.upgrade() else { return };
        let mut wanted = Vec::new();
        for slot in inner.slots.values_mut() {
            let decodes: [Option<Decode>; 6] = {
                let device = lock(&slot.device);
                std::array::from_fn(|bar| device.function().decode(bar))
            };
            for (mapped, want) in slot.mapped.iter_mut().zip(&decodes) {
                if mapped != want
                    && let Some(old) = mapped.take()
                {
                    unmap(&bus, old);
                }
            }
            wanted.push(decodes);
        }
        for (slot, decodes) in inner.slots.values_mut().zip(wanted) {
            for ((mapped, want), window) in slot.mapped.iter_mut().zip(decodes).zip(&slot.windows) {
                if let (None, Some(want)) = (*mapped, want)
                    && map(&bus, want, window, &inner.reserved)
                {
                    *mapped = Some(want);
                }
            }
        }
    }

    /// Does what firmware does before boot: places every BAR, largest first, switches decoding on and writes the
    /// interrupt lines.
    ///
    /// # Errors
    /// When a BAR finds no room.
    pub fn place_bars(&self) -> Result<(), PciError> {
        let mut inner = lock(&self.inner);
        let mut asks: Vec<(u64, Bdf, usize, bool)> = Vec::new();
        for (&bdf, slot) in &inner.slots {
            let device = lock(&slot.device);
            let f = device.function();
            asks.extend(
                (0..6).filter_map(|bar| Some((f.bar_len(bar)?, bdf, bar, f.bar_kind(bar)? == BarKind::Io))),
            );
        }
        asks.sort_by_key(|&(len, bdf, bar, _)| (std::cmp::Reverse(len), bdf, bar));
        let (mut memory, mut ports) = (MMIO_HOLE.start, IO_HOLE.start);
        for (len, bdf, bar, io) in asks {
            let (next, hole) = if io { (&mut ports, IO_HOLE) } else { (&mut memory, MMIO_HOLE) };
            // Memory BARs get pages of their own, so that a guest can map each with its own attributes.
            let step = if io { len } else { len.max(0x1000) };
            let start = find_room(
                next.next_multiple_of(step),
                step,
                hole.end,
                if io { &[] } else { &inner.reserved },
            )
            .ok_or(PciError::NoRoom { bdf, bar, len })?;
            *next = start + step;
            if let Some(slot) = inner.slots.get(&bdf) {
                lock(&slot.device).function_mut().set_bar(bar, start);
            }
        }
        for (bdf, slot) in &inner.slots {
            let mut device = lock(&slot.device);
            let f = device.function_mut();
            let pin = f.interrupt_pin();
            if pin != 0 {
                let route = FIRMWARE_ROUTES[usize::from(link_of_intx(bdf.device, pin) & 3)];
                f.set_bytes(reg::INTERRUPT_LINE, &[route]);
            }
            f.config_write(0x04, &COMMAND_IO_MEMORY);
        }
        self.remap_locked(&mut inner);
        Ok(())
    }

    /// Resets every function. The caller places BARs again with [`PciHost::place_bars`], as firmware would.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.address = 0;
        for slot in inner.slots.values() {
            lock(&slot.device).reset();
        }
        self.remap_locked(&mut inner);
    }

    /// The state of the bus and of every function's configuration space, so that devices need not save theirs.
    pub fn save_state(&self) -> StateBlob {
        let inner = lock(&self.inner);
        let functions =
            inner.slots.iter().map(|(&bdf, s)| (bdf, lock(&s.device).function().save())).collect();
        to_blob(NAME, VERSION, &HostState { address: inner.address, functions })
    }

    /// Takes on a saved state.
    ///
    /// # Errors
    /// When the blob is not of a bus with the same functions; nothing changed then.
    pub fn restore_state(&self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: HostState = from_blob(NAME, VERSION, blob)?;
        let unfit = |why: String| RestoreError::Unfit { name: NAME.to_owned(), why };
        let mut inner = lock(&self.inner);
        if !inner.slots.keys().eq(state.functions.iter().map(|(b, _)| b)) {
            return Err(unfit("other functions are plugged in".to_owned()));
        }
        for (slot, (bdf, saved)) in inner.slots.values().zip(&state.functions) {
            let fits = lock(&slot.device).function().fits(saved);
            fits.map_err(|why| unfit(format!("{:02x}.{}: {why}", bdf.device, bdf.function)))?;
        }
        for (slot, (_, saved)) in inner.slots.values().zip(&state.functions) {
            let mut device = lock(&slot.device);
            device.function_mut().restore(saved).map_err(unfit)?;
            device.config_restored();
        }
        inner.address = state.address & ADDRESS_MASK;
        self.remap_locked(&mut inner);
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct HostState {
    address: u32,
    functions: Vec<(Bdf, FunctionState)>,
}

impl Snapshot for Arc<PciHost> {
    fn save(&self) -> StateBlob {
        self.save_state()
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.restore_state(blob)
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn map(bus: &Bus, want: Decode, window: &Arc<Mutex<Window>>, reserved: &[Range<u64>]) -> bool {
    let Some(end) = want.start.checked_add(want.len) else { return false };
    if want.io {
        let (Ok(start), Ok(len)) = (u16::try_from(want.start), u16::try_from(want.len)) else { return false };
        let device: SharedPort = Arc::<Mutex<Window>>::clone(window);
        return end <= IO_HOLE.end && bus.add_ports(start, len, device).is_ok();
    }
    let range = want.start..end;
    end <= ADDRESS_END
        && !reserved.iter().any(|r| overlaps(r, &range))
        && bus.add_mmio(Gpa(want.start), want.len, Arc::<Mutex<Window>>::clone(window)).is_ok()
}

fn unmap(bus: &Bus, old: Decode) {
    if !old.io {
        bus.remove_mmio(Gpa(old.start));
    } else if let Ok(start) = u16::try_from(old.start) {
        bus.remove_ports(start);
    }
}

/// First multiple of `step` from `at` on where `step` bytes below `end` are free.
fn find_room(mut at: u64, step: u64, end: u64, reserved: &[Range<u64>]) -> Option<u64> {
    loop {
        let range = at..at.checked_add(step)?;
        if range.end > end {
            return None;
        }
        match reserved.iter().find(|r| overlaps(r, &range)) {
            Some(r) => at = r.end.checked_next_multiple_of(step)?,
            None => return Some(at),
        }
    }
}

/// Bits of CONFIG_ADDRESS that exist.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// The function and register that a configuration address names, if it names one on bus 0.
fn target(address: u32) -> Option<(Bdf, u16)> {
    if address & ADDRESS_ENABLE == 0 || address >> 16 & 0xff != 0 {
        return None;
    }
    let [low, devfn, ..] = address.to_le_bytes();
    Some((Bdf { device: devfn >> 3, function: devfn & 7 }, u16::from(low & 0xfc)))
}

/// Configuration mechanism #1: ports 0xcf8–0xcff. A byte access to 0xcf9 goes to the chipset's reset control register,
/// which lives among them.
pub struct PciPorts {
    host: Arc<PciHost>,
    reset_control: Option<SharedPort>,
}

impl PciPorts {
    /// First port; there are 8.
    pub const FIRST: u16 = 0xcf8;

    /// The ports of `host`; byte accesses to 0xcf9 go to offset 0 of `reset_control`.
    #[must_use]
    pub const fn new(host: Arc<PciHost>, reset_control: Option<SharedPort>) -> Self {
        Self { host, reset_control }
    }
}

impl PortDevice for PciPorts {
    fn port_read(&mut self, offset: u16, size: u8) -> u32 {
        let address = lock(&self.host.inner).address;
        match (offset, size) {
            (0, 4) => address,
            (1, 1) => self.reset_control.as_ref().map_or(0xff, |d| lock(d).port_read(0, 1)),
            (4..8, _) => {
                let mut data = [0; 4];
                let len = usize::from(size.min(4));
                data[..len].fill(0xff);
                if let Some((bdf, register)) = target(address) {
                    self.host.config_read(bdf, register + (offset - 4), &mut data[..len]);
                }
                u32::from_le_bytes(data)
            }
            _ => u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4))),
        }
    }

    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        match (offset, size) {
            (0, 4) => lock(&self.host.inner).address = value & ADDRESS_MASK,
            (1, 1) => {
                if let Some(device) = &self.reset_control {
                    lock(device).port_write(0, 1, value);
                }
            }
            (4..8, _) => {
                let address = lock(&self.host.inner).address;
                if let Some((bdf, register)) = target(address) {
                    let len = usize::from(size.min(4));
                    self.host.config_write(bdf, register + (offset - 4), &value.to_le_bytes()[..len]);
                }
            }
            _ => {}
        }
    }
}

/// The enhanced configuration window: 1 MiB, 4 KiB a function of bus 0.
pub struct Ecam(Arc<PciHost>);

impl Ecam {
    /// Length of the window in bytes.
    pub const LEN: u64 = 1 << 20;

    /// The window of `host`, to be put on the bus at `base`, where no BAR will go from now on.
    #[must_use]
    pub fn new(host: Arc<PciHost>, base: Gpa) -> Self {
        lock(&host.inner).reserved.push(base.0..base.0.saturating_add(Self::LEN));
        Self(host)
    }

    /// Calls `each` for every part of an access that stays in one dword: function, register, first byte, bytes.
    fn parts(offset: u64, len: usize, mut each: impl FnMut(Bdf, u16, Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = offset.wrapping_add(done as u64) & (Self::LEN - 1);
            let take = (4 - usize::try_from(at & 3).unwrap_or(0)).min(len - done);
            let devfn = u8::try_from(at >> 12 & 0xff).unwrap_or(0);
            let register = u16::try_from(at & 0xfff).unwrap_or(0);
            each(Bdf { device: devfn >> 3, function: devfn & 7 }, register, done..done + take);
            done += take;
        }
    }
}

impl MmioDevice for Ecam {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        Self::parts(offset, data.len(), |bdf, register, part| {
            self.0.config_read(bdf, register, &mut data[part]);
        });
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        Self::parts(offset, data.len(), |bdf, register, part| {
            self.0.config_write(bdf, register, &data[part]);
        });
    }
}

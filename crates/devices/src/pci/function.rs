//! One function's configuration space (PCI 3.0 ch. 6): bytes, write masks, BARs and capabilities.
//!
//! Invariant INV-PCI-1: guest writes change only bits in `mask`; so whatever a guest writes, identity, BAR types and sizes
//! and the capability list stay as built. Sizing a BAR by writing all ones works because the size bits are not writable
//! (PCI 3.0 6.2.5.1).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::intx::{Intx, IntxSink, NO_WIRE};
use super::msi::{self, Msi};
use super::msix::{self, Msix};
use crate::irq::IrqSink;

pub(super) mod reg {
    //! Offsets of the type-0 header.
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const BAR_END: usize = 0x28;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    /// First byte that capabilities may use.
    pub const CAPABILITY_AREA: usize = 0x40;
}

/// Bits of the command register (PCI 3.0 6.2.2).
mod command {
    pub const IO: u16 = 1;
    pub const MEMORY: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const PARITY: u16 = 1 << 6;
    pub const SERR: u16 = 1 << 8;
    pub const INTX_DISABLE: u16 = 1 << 10;
}
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
const MSI_ENABLE: u16 = 1;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface: `0xCCSSPP`.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; uses this register and the next.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    len: u64,
}

/// Where the MSI-X structures lie.
struct MsixPlace {
    msix: Arc<Msix>,
    capability: usize,
    bar: usize,
    table: u64,
    pba: u64,
}

/// Where a BAR is decoded now, in the guest's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decode {
    pub io: bool,
    pub start: u64,
    pub len: u64,
}

/// A function's saved configuration space and interrupt state; part of its device's snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionState {
    config: Vec<u8>,
    msix_table: Vec<[u32; 4]>,
    msix_pending: Vec<bool>,
    msi_pending: u32,
    intx: bool,
}

/// A type-0 function: configuration space, BARs and interrupt mechanisms.
pub struct PciFunction {
    config: Box<[u8; 256]>,
    mask: Box<[u8; 256]>,
    bars: [Option<Bar>; 6],
    last_capability: usize,
    free: usize,
    msi: Option<(Arc<Msi>, usize)>,
    msix: Option<MsixPlace>,
    intx: Arc<Intx>,
}

impl PciFunction {
    /// A function without BARs, capabilities or interrupt pin.
    #[must_use]
    pub fn new(id: PciIdentity) -> Self {
        let mut f = Self {
            config: Box::new([0; 256]),
            mask: Box::new([0; 256]),
            bars: [None; 6],
            last_capability: reg::CAPABILITIES,
            free: reg::CAPABILITY_AREA,
            msi: None,
            msix: None,
            intx: Arc::new(Intx::default()),
        };
        f.set_u16(0, id.vendor);
        f.set_u16(2, id.device);
        f.set_u32(8, id.class << 8 | u32::from(id.revision));
        f.set_u16(reg::SUBSYSTEM, id.subsystem_vendor);
        f.set_u16(reg::SUBSYSTEM + 2, id.subsystem);
        let writable = command::IO
            | command::MEMORY
            | command::BUS_MASTER
            | command::PARITY
            | command::SERR
            | command::INTX_DISABLE;
        f.set_writable(reg::COMMAND, &writable.to_le_bytes());
        f.set_writable(0x0c, &[0xff]); // Cache line size: scratch for the firmware.
        f.set_writable(reg::INTERRUPT_LINE, &[0xff]);
        f.config[reg::INTERRUPT_LINE] = NO_WIRE;
        f
    }

    // ---- building -------------------------------------------------------------------------------------------

    /// Gives the function an interrupt pin: 1 = INTA … 4 = INTD.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.config[reg::INTERRUPT_PIN] = pin.min(4);
    }

    /// Says that the device has more than one function (set on function 0).
    pub fn set_multifunction(&mut self) {
        self.config[reg::HEADER_TYPE] |= 0x80;
    }

    /// Adds BAR `index` of `len` bytes (rounded up to a power of two: at least 4 ports or 16 bytes).
    ///
    /// # Panics
    /// When the register does not exist or is in use, or `len` does not fit the kind: a mistake of the device's author.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, len: u64) {
        let len = len.next_power_of_two().max(if kind == BarKind::Io { 4 } else { 16 });
        let wide = matches!(kind, BarKind::Memory64 { .. });
        assert!(
            index + usize::from(wide) < 6 && self.bars[index].is_none(),
            "BAR {index} is taken or missing"
        );
        assert!(
            len <= 1 << if wide { 40 } else { 31 } && (kind != BarKind::Io || len <= 256),
            "BAR too long"
        );
        let kind_bits: u32 = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 4 | u32::from(prefetchable) << 3,
        };
        let at = reg::BAR0 + 4 * index;
        self.set_u32(at, kind_bits);
        let size_mask = (!(len - 1)).to_le_bytes();
        self.set_writable(at, &size_mask[..if wide { 8 } else { 4 }]);
        // Sizes are at least 4 or 16 bytes, so the type bits stay read-only.
        self.bars[index] = Some(Bar { kind, len });
    }

    /// Adds a capability: `body` follows the id and next bytes, `writable` says which of its bits a guest may write
    /// (short: the rest is read-only). Returns the offset of the capability's first byte (the id).
    ///
    /// # Panics
    /// When configuration space is full: a mistake of the device's author.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        let end = at + 2 + body.len();
        assert!(end <= 256 && writable.len() <= body.len(), "no room for capability {id:#x}");
        self.config[at] = id;
        self.config[at + 2..end].copy_from_slice(body);
        self.set_writable(at + 2, writable);
        let link = if self.last_capability == reg::CAPABILITIES {
            reg::CAPABILITIES
        } else {
            self.last_capability + 1
        };
        self.config[link] = u8::try_from(at).expect("checked against 256 above");
        self.config[reg::STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = at;
        self.free = end.next_multiple_of(4);
        at
    }

    /// Adds an MSI capability of `vectors` messages (1–32, rounded up to a power of two).
    pub fn add_msi(&mut self, vectors: u8) -> Arc<Msi> {
        let log = u16::try_from(vectors.clamp(1, 32).next_power_of_two().trailing_zeros()).unwrap_or(0);
        let control: u16 = log << 1 | 1 << 7 | 1 << 8; // 64-bit address, per-vector masking
        let mut body = [0u8; 22];
        body[..2].copy_from_slice(&control.to_le_bytes());
        let mut writable = [0u8; 22];
        writable[0] = 0x71; // enable, multiple message enable
        writable[2..6].copy_from_slice(&(!3u32).to_le_bytes());
        writable[6..12].fill(0xff); // address high, data
        let count = 1u32 << log;
        let mask = if count >= 32 { u32::MAX } else { (1 << count) - 1 };
        writable[14..18].copy_from_slice(&mask.to_le_bytes());
        let at = self.add_capability(CAP_MSI, &body, &writable);
        let msi = Arc::new(Msi::default());
        self.msi = Some((Arc::clone(&msi), at));
        msi
    }

    /// Adds an MSI-X capability of `vectors` entries, its table at `table` and its pending bits at `pba` (byte offsets,
    /// multiples of 8) in BAR `bar`, which the caller has added. The BAR may hold other registers too; the table and the
    /// pending bits never reach [`PciDevice::bar_read`](super::PciDevice::bar_read).
    ///
    /// # Panics
    /// When the structures overlap each other or leave the BAR: a mistake of the device's author.
    pub fn add_msix(&mut self, vectors: u16, bar: usize, table: u32, pba: u32) -> Arc<Msix> {
        assert!((1..=2048).contains(&vectors) && (table | pba).is_multiple_of(8), "MSI-X shape");
        let len = self.bars.get(bar).copied().flatten().expect("the MSI-X BAR is added first").len;
        let (t, p) = (u64::from(table), u64::from(pba));
        let (table_end, pba_end) = (t + table_bytes(vectors), p + pba_bytes(vectors));
        assert!(table_end <= len && pba_end <= len && (table_end <= p || pba_end <= t), "MSI-X layout");
        let bir = u32::try_from(bar).expect("at most 5");
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&(vectors - 1).to_le_bytes());
        body.extend_from_slice(&(table | bir).to_le_bytes());
        body.extend_from_slice(&(pba | bir).to_le_bytes());
        let capability = self.add_capability(CAP_MSIX, &body, &(MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes());
        let msix = Arc::new(Msix::new(vectors));
        self.msix = Some(MsixPlace { msix: Arc::clone(&msix), capability, bar, table: t, pba: p });
        msix
    }

    /// Lets a guest write the bits of `mask` from `offset` on.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        if let Some(slot) = self.mask.get_mut(offset..offset + mask.len()) {
            slot.copy_from_slice(mask);
        }
    }

    /// Sets bytes of configuration space, whatever the write masks say: for devices and firmware.
    pub fn set_bytes(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(slot) = self.config.get_mut(offset..offset.saturating_add(bytes.len())) {
            slot.copy_from_slice(bytes);
        }
    }

    fn set_u16(&mut self, offset: usize, value: u16) {
        self.set_bytes(offset, &value.to_le_bytes());
    }

    fn set_u32(&mut self, offset: usize, value: u32) {
        self.set_bytes(offset, &value.to_le_bytes());
    }

    // ---- state ----------------------------------------------------------------------------------------------

    /// The interrupt pin; keep a clone to drive it from elsewhere.
    #[must_use]
    pub const fn intx(&self) -> &Arc<Intx> {
        &self.intx
    }

    /// The MSI-X structures, if the function has them.
    #[must_use]
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|p| &p.msix)
    }

    /// The MSI capability, if the function has it.
    #[must_use]
    pub fn msi(&self) -> Option<&Arc<Msi>> {
        self.msi.as_ref().map(|(msi, _)| msi)
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.u16_at(reg::COMMAND)
    }

    /// Whether the guest lets the function reach memory (DMA and MSI).
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }

    /// Raw bytes of configuration space, as a device's own code needs them (0 beyond the end).
    #[must_use]
    pub fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut out = [0; N];
        if let Some(from) = self.config.get(offset..offset.saturating_add(N)) {
            out.copy_from_slice(from);
        }
        out
    }

    fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    /// Length in bytes of BAR `index`, if it exists.
    #[must_use]
    pub fn bar_len(&self, index: usize) -> Option<u64> {
        Some((*self.bars.get(index)?)?.len)
    }

    /// Kind of BAR `index`, if it exists.
    #[must_use]
    pub fn bar_kind(&self, index: usize) -> Option<BarKind> {
        Some((*self.bars.get(index)?)?.kind)
    }

    /// Address in BAR `index`, decoded or not.
    #[must_use]
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let bar = (*self.bars.get(index)?)?;
        let at = reg::BAR0 + 4 * index;
        let low = u64::from(self.u32_at(at));
        Some(match bar.kind {
            BarKind::Io => low & !3,
            BarKind::Memory32 => low & !15,
            BarKind::Memory64 { .. } => u64::from(self.u32_at(at + 4)) << 32 | low & !15,
        })
    }

    /// Puts BAR `index` at `address`, as firmware does.
    pub fn set_bar(&mut self, index: usize, address: u64) {
        let Some(bar) = self.bars.get(index).copied().flatten() else { return };
        let at = u16::try_from(reg::BAR0 + 4 * index).expect("index is below 6");
        let bytes = address.to_le_bytes();
        self.config_write(at, &bytes[..4]);
        if matches!(bar.kind, BarKind::Memory64 { .. }) {
            self.config_write(at + 4, &bytes[4..]);
        }
    }

    /// Where BAR `index` is to be decoded: nowhere while the command register keeps its space off or its address is 0.
    pub(super) fn decode(&self, index: usize) -> Option<Decode> {
        let bar = (*self.bars.get(index)?)?;
        let io = bar.kind == BarKind::Io;
        let enable = if io { command::IO } else { command::MEMORY };
        let start = self.bar_address(index)?;
        let decoded = self.command() & enable != 0 && start != 0;
        decoded.then_some(Decode { io, start, len: bar.len })
    }

    // ---- guest accesses -------------------------------------------------------------------------------------

    /// Reads configuration space; bytes beyond the 256 read as 0 (no extended capabilities).
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.config.get(at).copied().unwrap_or(0);
            if at == reg::STATUS && self.intx.level() {
                *byte |= STATUS_INTERRUPT;
            }
            if let Some((msi, base)) = &self.msi
                && (base + 20..base + 24).contains(&at)
            {
                *byte = msi.pending().to_le_bytes()[at - base - 20];
            }
        }
    }

    /// Writes configuration space under the write masks and lets the change take effect on interrupts. BARs move on the
    /// bus after the device's `config_write` has returned to the host.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        for (at, &byte) in (usize::from(offset)..).zip(data) {
            if let (Some(slot), Some(&mask)) = (self.config.get_mut(at), self.mask.get(at)) {
                *slot = *slot & !mask | byte & mask;
            }
        }
        self.settle_interrupts();
    }

    fn msi_control(&self, at: usize) -> msi::Control {
        let control = self.u16_at(at + 2);
        msi::Control {
            enabled: control & MSI_ENABLE != 0,
            bus_master: self.bus_master(),
            address: u64::from(self.u32_at(at + 8)) << 32 | u64::from(self.u32_at(at + 4)),
            data: self.u16_at(at + 12),
            vectors: 1 << (control >> 4 & 7).min(control >> 1 & 7).min(5),
            mask: self.u32_at(at + 16),
        }
    }

    fn msix_control(&self, at: usize) -> msix::Control {
        let control = self.u16_at(at + 2);
        msix::Control {
            enabled: control & MSIX_ENABLE != 0,
            masked: control & MSIX_MASK_ALL != 0,
            bus_master: self.bus_master(),
        }
    }

    fn settle_interrupts(&self) {
        let mut messages = false;
        if let Some((msi, at)) = &self.msi {
            let control = self.msi_control(*at);
            messages |= control.enabled;
            msi.set_control(control);
        }
        if let Some(place) = &self.msix {
            let control = self.msix_control(place.capability);
            messages |= control.enabled;
            place.msix.set_control(control);
        }
        // A function that signals by messages must not use its pin (PCI 3.0 6.8.1.3, 6.8.2.3).
        self.intx.set_disabled(messages || self.command() & command::INTX_DISABLE != 0);
    }

    /// A BAR access that lies in the MSI-X structures is answered here; says whether it was.
    pub(super) fn msix_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        match self.msix_hit(bar, offset) {
            Some((place, true)) => place.msix.table_read(offset - place.table, data),
            Some((place, false)) => place.msix.pba_read(offset - place.pba, data),
            None => return false,
        }
        true
    }

    /// See [`PciFunction::msix_read`].
    pub(super) fn msix_write(&self, bar: usize, offset: u64, data: &[u8]) -> bool {
        match self.msix_hit(bar, offset) {
            Some((place, true)) => place.msix.table_write(offset - place.table, data),
            Some((_, false)) => {}
            None => return false,
        }
        true
    }

    fn msix_hit(&self, bar: usize, offset: u64) -> Option<(&MsixPlace, bool)> {
        let place = self.msix.as_ref().filter(|p| p.bar == bar)?;
        let vectors = u16::try_from(place.msix.len()).unwrap_or(2048);
        if (place.table..place.table + table_bytes(vectors)).contains(&offset) {
            return Some((place, true));
        }
        (place.pba..place.pba + pba_bytes(vectors)).contains(&offset).then_some((place, false))
    }

    /// Connects interrupts to the board. The host calls it when the function is plugged in.
    pub(super) fn connect(&self, messages: &Arc<dyn IrqSink>, pins: &Arc<dyn IntxSink>, link: u8) {
        if let Some((msi, _)) = &self.msi {
            msi.connect(Arc::clone(messages));
        }
        if let Some(place) = &self.msix {
            place.msix.connect(Arc::clone(messages));
        }
        self.intx.connect(Arc::clone(pins), link);
    }

    /// The interrupt pin number, 0 when there is none.
    #[must_use]
    pub fn interrupt_pin(&self) -> u8 {
        self.config[reg::INTERRUPT_PIN]
    }

    // ---- reset and snapshot ---------------------------------------------------------------------------------

    /// What a bus reset does: all that a guest can write becomes 0, interrupts are off. BARs leave the bus at the
    /// host's next [`PciHost::remap`](super::PciHost::remap).
    pub fn reset(&mut self) {
        for (byte, mask) in self.config.iter_mut().zip(self.mask.iter()) {
            *byte &= !mask;
        }
        self.config[reg::INTERRUPT_LINE] = NO_WIRE;
        self.settle_interrupts();
        if let Some(place) = &self.msix {
            let fresh = Msix::new(u16::try_from(place.msix.len()).unwrap_or(2048)).save();
            place.msix.restore(&fresh.0, &fresh.1, self.msix_control(place.capability));
        }
        if let Some((msi, at)) = &self.msi {
            msi.restore(0, self.msi_control(*at));
        }
        self.intx.set(false);
    }

    /// The state now.
    #[must_use]
    pub fn save(&self) -> FunctionState {
        let (msix_table, msix_pending) = self.msix.as_ref().map(|p| p.msix.save()).unwrap_or_default();
        FunctionState {
            config: self.config.to_vec(),
            msix_table,
            msix_pending,
            msi_pending: self.msi.as_ref().map_or(0, |(m, _)| m.pending()),
            intx: self.intx.level(),
        }
    }

    /// Checks a saved state against this function: everything a guest cannot write must agree.
    ///
    /// # Errors
    /// Says what does not fit.
    pub fn fits(&self, state: &FunctionState) -> Result<(), String> {
        if state.config.len() != self.config.len() {
            return Err(format!("configuration space of {} bytes", state.config.len()));
        }
        let fixed = self.config.iter().zip(self.mask.iter());
        for (at, (&new, (&old, &mask))) in state.config.iter().zip(fixed).enumerate() {
            if (new ^ old) & !mask != 0 {
                return Err(format!("configuration byte {at:#x} is {new:#x}, this function has {old:#x}"));
            }
        }
        match &self.msix {
            Some(place) if !place.msix.fits(&state.msix_table, &state.msix_pending) => {
                Err(format!("{} MSI-X vectors", state.msix_table.len()))
            }
            _ => Ok(()),
        }
    }

    /// Takes on a saved state. BARs move at the host's next [`PciHost::remap`](super::PciHost::remap).
    ///
    /// # Errors
    /// See [`PciFunction::fits`]; the function is unchanged then.
    pub fn restore(&mut self, state: &FunctionState) -> Result<(), String> {
        self.fits(state)?;
        self.config.copy_from_slice(&state.config);
        if let Some(place) = &self.msix {
            let control = self.msix_control(place.capability);
            place.msix.restore(&state.msix_table, &state.msix_pending, control);
        }
        if let Some((msi, at)) = &self.msi {
            msi.restore(state.msi_pending, self.msi_control(*at));
        }
        self.settle_interrupts();
        self.intx.set(state.intx);
        Ok(())
    }
}

fn table_bytes(vectors: u16) -> u64 {
    u64::from(vectors) * 16
}

fn pba_bytes(vectors: u16) -> u64 {
    u64::from(vectors).div_ceil(64) * 8
}

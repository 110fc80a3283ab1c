//! The transport's registers and what writing them means: feature negotiation, status, queue set-up
//! (virtio 1.2 2.1, 3.1, 4.1.4.3). Used by the modern and by the legacy interface.

use serde::{Deserialize, Serialize};

use super::feature;
use super::interrupt::Interrupt;
use super::queue::Layout;

/// Bits of the device status (virtio 1.2 2.1).
pub(super) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    /// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED: what a driver may set.
    pub const WRITABLE: u8 = 0x8f;
}

/// Length in bytes of `struct virtio_pci_common_cfg` up to `queue_device`, without the optional fields after it.
pub(super) const COMMON_BYTES: usize = 56;

/// What the transport has to do after a register was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    None,
    Activate,
    Reset,
}

/// One queue's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub layout: Layout,
    pub enabled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    pub queues: Vec<QueueRegisters>,
}

impl Registers {
    pub fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter().map(|&size| {
            let layout = Layout { size, ..Layout::default() };
            QueueRegisters { layout, enabled: false }
        });
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queues.collect(),
        }
    }

    /// Whether the driver said DRIVER_OK.
    pub const fn is_driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// What both sides agreed on.
    pub const fn negotiated(&self) -> u64 {
        self.driver_features & self.offered
    }

    pub fn status(&self, interrupt: &Interrupt) -> u8 {
        self.status | if interrupt.wants_reset() { status::NEEDS_RESET } else { 0 }
    }

    /// `legacy`: without FEATURES_OK and VERSION_1.
    pub fn set_status(&mut self, value: u8, legacy: bool) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let mut new = value & status::WRITABLE;
        let refused =
            self.driver_features & !self.offered != 0 || self.driver_features & feature::VERSION_1 == 0;
        if !legacy && self.status & status::FEATURES_OK == 0 && refused {
            // Virtio 1.2 3.1.1 step 6: the driver reads the bit back to see whether we agree.
            new &= !status::FEATURES_OK;
        }
        let was_ok = self.is_driver_ok();
        self.status = new;
        if self.is_driver_ok() && !was_ok { Action::Activate } else { Action::None }
    }

    /// The bits of `features` that a driver reads through a 32-bit window.
    fn window(features: u64, select: u32) -> u32 {
        match select {
            0 => low32(features),
            1 => low32(features >> 32),
            _ => 0,
        }
    }

    /// The driver's choice for one window; too late once it is agreed.
    pub fn set_driver_features(&mut self, select: u32, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let (shift, keep) = match select {
            0 => (0, u64::MAX << 32),
            1 => (32, u64::from(u32::MAX)),
            _ => return,
        };
        self.driver_features = self.driver_features & keep | u64::from(value) << shift;
    }

    pub fn driver_features_low(&self) -> u32 {
        low32(self.driver_features)
    }

    pub const fn queue_select(&self) -> u16 {
        self.queue_select
    }

    pub const fn select_queue(&mut self, queue: u16) {
        self.queue_select = queue;
    }

    pub fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    pub fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    // ---- struct virtio_pci_common_cfg ------------------------------------------------------------------------

    /// The structure as it reads now.
    pub fn common(&self, interrupt: &Interrupt) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.device_feature_select.to_le_bytes());
        put(4, &Self::window(self.offered, self.device_feature_select).to_le_bytes());
        put(8, &self.driver_feature_select.to_le_bytes());
        put(12, &Self::window(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(16, &interrupt.config_vector().to_le_bytes());
        put(18, &u16::try_from(self.queues.len()).unwrap_or(u16::MAX).to_le_bytes());
        put(20, &[self.status(interrupt), interrupt.generation()]);
        put(22, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(24, &queue.layout.size.to_le_bytes());
            put(26, &interrupt.queue_vector(self.queue_select).to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes()); // queue_notify_off
            put(32, &queue.layout.desc.to_le_bytes());
            put(40, &queue.layout.avail.to_le_bytes());
            put(48, &queue.layout.used.to_le_bytes());
        }
        image
    }

    /// A write of one field (or of half of a 64-bit one, virtio 1.2 4.1.3.1). Other accesses are the driver's mistake and
    /// ignored.
    pub fn common_write(&mut self, interrupt: &Interrupt, offset: u64, data: &[u8], max: &[u16]) -> Action {
        let value = le_value(data);
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = low32(value),
            (8, 4) => self.driver_feature_select = low32(value),
            (12, 4) => self.set_driver_features(self.driver_feature_select, low32(value)),
            (16, 2) => interrupt.set_config_vector(low16(value)),
            (20, 1) => return self.set_status(low16(value).to_le_bytes()[0], false),
            (22, 2) => self.queue_select = low16(value),
            (24, 2) => self.set_queue_size(low16(value), max),
            (26, 2) => interrupt.set_queue_vector(self.queue_select, low16(value)),
            (28, 2) => self.enable_queue(value),
            (32 | 36 | 40 | 44 | 48 | 52, 4) | (32 | 40 | 48, 8) => self.set_address(offset, data),
            _ => {}
        }
        Action::None
    }

    /// The selected queue, while it may still be changed.
    fn idle_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.is_driver_ok() {
            return None;
        }
        self.selected_mut().filter(|q| !q.enabled)
    }

    fn set_queue_size(&mut self, size: u16, max: &[u16]) {
        let max = max.get(usize::from(self.queue_select)).copied().unwrap_or(0);
        if let Some(queue) = self.idle_queue()
            && size.is_power_of_two()
            && size <= max
        {
            queue.layout.size = size;
        }
    }

    /// Writing 0 does nothing (virtio 1.2 4.1.4.3.2).
    fn enable_queue(&mut self, value: u64) {
        if let Some(queue) = self.idle_queue()
            && value == 1
        {
            queue.enabled = queue.layout.is_usable();
        }
    }

    fn set_address(&mut self, offset: u64, data: &[u8]) {
        let Some(queue) = self.idle_queue() else { return };
        let field = match offset {
            32..40 => &mut queue.layout.desc,
            40..48 => &mut queue.layout.avail,
            _ => &mut queue.layout.used,
        };
        let mut bytes = field.to_le_bytes();
        for (at, &byte) in (usize::from(offset & 4 != 0) * 4..8).zip(data) {
            bytes[at] = byte;
        }
        *field = u64::from_le_bytes(bytes);
    }

    /// Whether a saved state has this device's shape.
    pub fn fits(&self, max: &[u16]) -> bool {
        self.queues.len() == max.len()
            && self.queues.iter().zip(max).all(|(q, &max)| {
                q.layout.size.is_power_of_two()
                    && q.layout.size <= max
                    && (!q.enabled || q.layout.is_usable())
            })
    }
}

/// The little-endian integer in up to 8 bytes; 0 for longer accesses, which no register has.
pub(super) fn le_value(data: &[u8]) -> u64 {
    if data.len() > 8 { 0 } else { data.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)) }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
pub(super) const fn low32(value: u64) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "the low bits are meant")]
pub(super) const fn low16(value: u64) -> u16 {
    value as u16
}

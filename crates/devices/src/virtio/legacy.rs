//! The legacy interface in I/O ports, which old kernels, BSDs and boot loaders speak (virtio 1.2 4.1.4.10, "virtio 0.9.5").
//!
//! One header in BAR 0: 20 bytes, then two MSI-X vectors while MSI-X is on, then the device's configuration. A queue has its
//! maximal size and lies in one piece at a page number: descriptors, available ring, and the used ring on the next page
//! boundary (2.7.2). No FEATURES_OK, no VERSION_1, features of 32 bits.

use super::interrupt::Interrupt;
use super::queue::Layout;
use super::registers::{Action, Registers, le_value, low16, low32};

/// Length in bytes of the port range: room for the longest configuration.
pub(super) const PORTS: u64 = 128;
/// Features beyond the device's own that only this interface offers.
pub(super) const EXTRA_FEATURES: u64 = super::feature::ANY_LAYOUT;

/// What a port access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A register of the header.
    Header(u64),
    /// A byte offset into the device's configuration.
    Config(u64),
}

pub(super) fn place(offset: u64, msix: bool) -> Place {
    let config = if msix { 24 } else { 20 };
    if offset < config { Place::Header(offset) } else { Place::Config(offset - config) }
}

/// The header as it reads now, but for the ISR status, whose reading has an effect.
pub(super) fn header(registers: &Registers, interrupt: &Interrupt) -> [u8; 24] {
    let mut image = [0; 24];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &low32(registers.offered | EXTRA_FEATURES).to_le_bytes());
    put(4, &registers.driver_features_low().to_le_bytes());
    if let Some(queue) = registers.selected() {
        let page = if queue.enabled { queue.layout.desc >> 12 } else { 0 };
        put(8, &low32(page).to_le_bytes());
        put(12, &queue.layout.size.to_le_bytes());
    }
    put(14, &registers.queue_select().to_le_bytes());
    put(18, &[registers.status(interrupt)]);
    put(20, &interrupt.config_vector().to_le_bytes());
    put(22, &interrupt.queue_vector(registers.queue_select()).to_le_bytes());
    image
}

/// Offset of the ISR status.
pub(super) const ISR: u64 = 19;
/// Offset of the queue notify register.
pub(super) const NOTIFY: u64 = 16;

/// A write of one register other than notify.
pub(super) fn write(registers: &mut Registers, interrupt: &Interrupt, offset: u64, data: &[u8]) -> Action {
    let value = le_value(data);
    match (offset, data.len()) {
        (4, 4) => registers.set_driver_features(0, low32(value)),
        (8, 4) => return set_page(registers, low32(value)),
        (14, 2) => registers.select_queue(low16(value)),
        (18, 1) => return registers.set_status(low16(value).to_le_bytes()[0], true),
        (20, 2) => interrupt.set_config_vector(low16(value)),
        (22, 2) => interrupt.set_queue_vector(registers.queue_select(), low16(value)),
        _ => {}
    }
    Action::None
}

/// Page 0 resets the device, as QEMU does: it is how old drivers let go of it.
fn set_page(registers: &mut Registers, page: u32) -> Action {
    if page == 0 {
        return Action::Reset;
    }
    if !registers.is_driver_ok()
        && let Some(queue) = registers.selected_mut()
    {
        queue.layout = one_piece(u64::from(page) << 12, queue.layout.size);
        queue.enabled = queue.layout.is_usable();
    }
    Action::None
}

/// 2.7.2 "Legacy Interfaces: A Note on Virtqueue Layout".
fn one_piece(desc: u64, size: u16) -> Layout {
    let avail = desc + 16 * u64::from(size);
    let used = (avail + 2 * (3 + u64::from(size))).next_multiple_of(4096);
    Layout { size, desc, avail, used }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_piece_queue_of_256_is_three_pages() {
        let layout = one_piece(0x10_0000, 256);
        assert_eq!((layout.avail, layout.used), (0x10_1000, 0x10_2000));
    }

    #[test]
    fn config_follows_the_vectors_when_msix_is_on() {
        assert_eq!(place(20, false), Place::Config(0));
        assert_eq!(place(20, true), Place::Header(20));
        assert_eq!(place(25, true), Place::Config(1));
    }
}

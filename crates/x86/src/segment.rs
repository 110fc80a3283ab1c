//! Segment registers and descriptors (SDM 3A 3.4.5, 5.8.3).

use serde::{Deserialize, Serialize};

/// The hidden attributes of a segment register: descriptor bits 40–55, with the limit's bits 48–51 left out:
/// type 0–3, S 4, DPL 5–6, P 7, AVL 12, L 13, D/B 14, G 15 (the layout of VMX access rights, SDM 3C 24.4.1).
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Hash)]
pub struct Attr(pub u16);

#[expect(missing_docs, reason = "the manual's names")]
impl Attr {
    pub const ACCESSED: u16 = 1;
    pub const WRITABLE: u16 = 2;
    pub const READABLE: u16 = 2;
    pub const EXPAND_DOWN: u16 = 4;
    pub const CONFORMING: u16 = 4;
    pub const CODE: u16 = 8;
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 12;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;

    /// Type field, 0 to 15.
    #[must_use]
    pub const fn typ(self) -> u8 {
        (self.0 & 15) as u8
    }
    #[must_use]
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 & Self::P != 0
    }
    /// Code or data, as opposed to a system descriptor.
    #[must_use]
    pub const fn is_code_or_data(self) -> bool {
        self.0 & Self::S != 0
    }
    #[must_use]
    pub const fn is_code(self) -> bool {
        self.0 & (Self::S | Self::CODE) == Self::S | Self::CODE
    }
    #[must_use]
    pub const fn is_data(self) -> bool {
        self.0 & (Self::S | Self::CODE) == Self::S
    }
    #[must_use]
    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.0 & Self::CONFORMING != 0
    }
    #[must_use]
    pub const fn is_expand_down(self) -> bool {
        self.is_data() && self.0 & Self::EXPAND_DOWN != 0
    }
    /// Data that may be written.
    #[must_use]
    pub const fn is_writable(self) -> bool {
        self.is_data() && self.0 & Self::WRITABLE != 0
    }
    /// Data, or code that may be read.
    #[must_use]
    pub const fn is_readable(self) -> bool {
        self.is_data() || self.is_code() && self.0 & Self::READABLE != 0
    }
    #[must_use]
    pub const fn long(self) -> bool {
        self.0 & Self::L != 0
    }
    #[must_use]
    pub const fn db(self) -> bool {
        self.0 & Self::DB != 0
    }
}

impl std::fmt::Debug for Attr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// A segment register with its hidden part. A null (unusable) one has [`Attr::P`] clear.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Attributes.
    pub attr: Attr,
    /// Limit in bytes, granularity applied: the last valid offset (for expand-down: the last invalid one).
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

impl Segment {
    /// A segment as real mode makes it (SDM 3B 20.1.1): data, writable, 64 KiB.
    #[must_use]
    pub const fn real_mode(selector: u16) -> Self {
        Self { selector, attr: Attr(0x93), limit: 0xffff, base: (selector as u64) << 4 }
    }

    /// The segment that an 8-byte descriptor describes (code, data, 32-bit system). `selector` is taken as it is.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "picks fields out of the descriptor")]
    pub const fn from_descriptor(selector: u16, raw: u64) -> Self {
        let attr = Attr((raw >> 40) as u16 & 0xf0ff);
        let mut limit = (raw & 0xffff) as u32 | (raw >> 32) as u32 & 0xf_0000;
        if attr.0 & Attr::G != 0 {
            limit = limit << 12 | 0xfff;
        }
        let base = raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000;
        Self { selector, attr, limit, base }
    }

    /// Requested privilege level of the selector.
    #[must_use]
    pub const fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}

/// Types of system descriptors (SDM 3A table 3-2).
#[expect(missing_docs, reason = "the manual's names")]
pub mod system_type {
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS32_AVAILABLE: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    pub const CALL_GATE32: u8 = 12;
    pub const INTERRUPT_GATE32: u8 = 14;
    pub const TRAP_GATE32: u8 = 15;
}

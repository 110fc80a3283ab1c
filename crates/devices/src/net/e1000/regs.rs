//! Registers of the 82540EM (Software Developer's Manual for the PCI/PCI-X family, chapter 13): offsets in BAR 0, and bits.

pub const CTRL: u32 = 0x0000;
pub const STATUS: u32 = 0x0008;
pub const EECD: u32 = 0x0010;
pub const EERD: u32 = 0x0014;
pub const MDIC: u32 = 0x0020;
pub const VET: u32 = 0x0038;
pub const ICR: u32 = 0x00c0;
pub const ITR: u32 = 0x00c4;
pub const ICS: u32 = 0x00c8;
pub const IMS: u32 = 0x00d0;
pub const IMC: u32 = 0x00d8;
pub const RCTL: u32 = 0x0100;
pub const TCTL: u32 = 0x0400;
pub const PBA: u32 = 0x1000;
/// The receive ring: base low and high, length, head at 0x10, tail at 0x18.
pub const RDBAL: u32 = 0x2800;
pub const RDT: u32 = 0x2818;
/// The transmit ring, likewise.
pub const TDBAL: u32 = 0x3800;
pub const TDT: u32 = 0x3818;
/// Statistics, 64 registers that a read clears (13.7).
pub const STATISTICS: u32 = 0x4000;
/// The last of them.
pub const STATISTICS_LAST: u32 = 0x40fc;
pub const RXCSUM: u32 = 0x5000;
/// Multicast table array, 128 registers.
pub const MTA: u32 = 0x5200;
/// Receive addresses, 16 pairs.
pub const RAL0: u32 = 0x5400;
pub const RAH0: u32 = 0x5404;
/// VLAN filter table array, 128 registers.
pub const VFTA: u32 = 0x5600;
/// All registers lie below.
pub const END: u32 = 0x6000;

/// CTRL (13.4.1).
pub mod ctrl {
    pub const RST: u32 = 1 << 26;
    pub const VME: u32 = 1 << 30;
    pub const PHY_RST: u32 = 1 << 31;
}

/// STATUS (13.4.2): full duplex, 1000 Mb/s as found out by negotiation.
pub mod status {
    pub const FULL_DUPLEX: u32 = 1;
    pub const LINK_UP: u32 = 1 << 1;
    pub const SPEED_1000: u32 = 2 << 6 | 2 << 8;
}

/// Causes of interrupts (13.4.17).
pub mod cause {
    pub const TXDW: u32 = 1;
    pub const TXQE: u32 = 1 << 1;
    pub const LSC: u32 = 1 << 2;
    pub const RXDMT0: u32 = 1 << 4;
    pub const RXT0: u32 = 1 << 7;
    /// Those that there are.
    pub const ALL: u32 = 0x0001_ffff;
}

/// RCTL (13.4.22).
pub mod rctl {
    pub const EN: u32 = 1 << 1;
    pub const UPE: u32 = 1 << 3;
    pub const MPE: u32 = 1 << 4;
    pub const LPE: u32 = 1 << 5;
    pub const BAM: u32 = 1 << 15;
    pub const VFE: u32 = 1 << 18;
    pub const BSEX: u32 = 1 << 25;
    pub const SECRC: u32 = 1 << 26;
}

/// TCTL (13.4.33).
pub mod tctl {
    pub const EN: u32 = 1 << 1;
    pub const PSP: u32 = 1 << 3;
}

/// RXCSUM (13.5.15).
pub mod rxcsum {
    pub const IPOFL: u32 = 1 << 8;
    pub const TUOFL: u32 = 1 << 9;
}

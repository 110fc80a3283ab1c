//! Where registers are, and what their bits are called.

/// The first port's registers (AHCI 3.3).
pub(super) const PORTS_AT: u64 = 0x100;
/// Bytes of a port's registers.
pub(super) const PORT_BYTES: u64 = 0x80;

/// Global registers (AHCI 3.1).
pub(super) mod global {
    pub const CAP: u64 = 0x00;
    pub const GHC: u64 = 0x04;
    pub const IS: u64 = 0x08;
    pub const PI: u64 = 0x0c;
    pub const VS: u64 = 0x10;

    pub const GHC_HR: u32 = 1;
    pub const GHC_IE: u32 = 1 << 1;
    pub const GHC_AE: u32 = 1 << 31;
    /// 64-bit addresses, native command queuing, AHCI only, 1.5 Gb/s, command list override, 32 slots.
    pub const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 20 | 1 << 18 | 31 << 8;
    /// 1.3.1.
    pub const VERSION: u32 = 0x0001_0301;
}

/// A port's registers (AHCI 3.3).
pub(super) mod reg {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// PxIS and PxIE (AHCI 3.3.5).
pub(super) mod event {
    /// A device-to-host register FIS came.
    pub const DHRS: u32 = 1;
    /// A PIO set-up FIS came.
    pub const PSS: u32 = 1 << 1;
    /// A set-device-bits FIS came.
    pub const SDBS: u32 = 1 << 3;
    /// The list of places was too short.
    pub const OFS: u32 = 1 << 24;
    /// Memory could not be used.
    pub const HBFS: u32 = 1 << 29;
    /// The device reported an error.
    pub const TFES: u32 = 1 << 30;
    /// All that there are.
    pub const ALL: u32 = 0xfdc0_00ff;
}

/// PxCMD (AHCI 3.3.7).
pub(super) mod cmd {
    pub const ST: u32 = 1;
    /// Spin-up and power: always on.
    pub const SUD_POD: u32 = 3 << 1;
    pub const CLO: u32 = 1 << 3;
    pub const FRE: u32 = 1 << 4;
    pub const FR: u32 = 1 << 14;
    pub const CR: u32 = 1 << 15;
    pub const ATAPI: u32 = 1 << 24;
    /// What a guest may write and read back.
    pub const WRITABLE: u32 = ST | FRE | ATAPI | 7 << 25;
}

/// The task file's status and error (ATA8-ACS 6.2, 6.3).
pub(super) mod status {
    pub const ERR: u8 = 1;
    pub const DRQ: u8 = 1 << 3;
    pub const SEEK: u8 = 1 << 4;
    pub const DRDY: u8 = 1 << 6;
    pub const BSY: u8 = 1 << 7;
    /// Ready, nothing wrong.
    pub const GOOD: u8 = DRDY | SEEK;
    /// Error register: command aborted.
    pub const ABRT: u8 = 1 << 2;
    /// Error register: no such address.
    pub const IDNF: u8 = 1 << 4;
    /// Error register: uncorrectable data.
    pub const UNC: u8 = 1 << 6;
}

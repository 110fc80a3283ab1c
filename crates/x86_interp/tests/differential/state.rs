//! What both machines are given and what they come back with.

use std::fmt::Write;

use x86::cpuid::Host;

/// Where the code of a case lies, in both machines: two pages, readable and executable.
pub const CODE: u64 = 0x1000_0000;
pub const CODE_BYTES: usize = 0x2000;
/// Where its data lies: four writable pages, then a read-only one; nothing is mapped around either.
pub const DATA: u64 = 0x2000_0000;
pub const DATA_BYTES: usize = 0x4000;
pub const READ_ONLY_BYTES: usize = 0x1000;

/// Bytes of an FP/SIMD area.
pub const AREA: usize = x86::state::FPU_BYTES;
/// State components that are compared: x87, SSE, AVX, and the three of AVX-512 (SDM 1 13.1).
const COMPARED: u64 = 0xe7;

/// Which code is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit code.
    Long,
    /// 32-bit code in compatibility mode.
    Compat,
}

impl Mode {
    pub const fn bits(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Compat => 32,
        }
    }

    /// CS as Linux gives it to user programs.
    pub const fn cs(self) -> u16 {
        match self {
            Self::Long => 0x33,
            Self::Compat => 0x23,
        }
    }
}

/// Registers of user code.
#[derive(Clone)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// Standard XSAVE format without a meaning in its header: every component is there.
    pub fpu: Box<[u8; AREA]>,
}

/// How a run ended.
#[derive(Clone)]
pub struct Outcome {
    pub regs: Registers,
    pub vector: u8,
    pub error: u64,
    /// Address of a page fault, else 0.
    pub cr2: u64,
    pub data: Vec<u8>,
}

/// Extended components that are compared, as (bit, offset, size).
pub fn components() -> Vec<(u32, usize, usize)> {
    let all = Host::get().identity.xsave.iter();
    all.map(|c| (u32::from(c.index), c.offset as usize, c.size as usize))
        .filter(|c| COMPARED >> c.0 & 1 != 0 && c.1 + c.2 <= AREA)
        .collect()
}

/// Components that are loaded and compared.
pub fn component_mask() -> u64 {
    components().iter().fold(3, |mask, c| mask | 1 << c.0)
}

/// FOP, FIP and FDP are compared while an unmasked x87 exception is pending: else AMD's processors save zeros and
/// Intel's the last instruction's (APM 2 11.5.4 "XSAVE", SDM 1 8.1.8).
fn pointers_mean_nothing(area: &[u8; AREA]) -> bool {
    area[2] & 0x80 == 0
}

/// Makes an area comparable: reserved bytes, MXCSR_MASK and the header become zero.
pub fn normalise(area: &mut [u8; AREA], mode: Mode) {
    area[5] = 0;
    area[28..32].fill(0);
    if pointers_mean_nothing(area) {
        area[6..24].fill(0);
    }
    if mode == Mode::Compat {
        // FCS and FDS: the host kernel saves the 64-bit form, which has no room for them.
        area[12..16].fill(0);
        area[20..24].fill(0);
    }
    for i in 0..8 {
        area[32 + 16 * i + 10..32 + 16 * i + 16].fill(0);
    }
    area[416..576].fill(0);
    let mut end = 576;
    let mut used = components();
    used.sort_by_key(|c| c.1);
    for (_, at, len) in used {
        area[end..at].fill(0);
        end = at + len;
    }
    area[end..].fill(0);
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

pub fn area_name(at: usize) -> String {
    match at {
        0..2 => "fcw".into(),
        2..4 => "fsw".into(),
        4 => "ftw".into(),
        6..8 => "fop".into(),
        8..16 => "fip".into(),
        16..24 => "fdp".into(),
        24..28 => "mxcsr".into(),
        32..160 => format!("st{}[{}]", (at - 32) / 16, at % 16),
        160..416 => format!("xmm{}[{}]", (at - 160) / 16, at % 16),
        _ => components().iter().find(|c| (c.1..c.1 + c.2).contains(&at)).map_or_else(
            || format!("area+{at:#x}"),
            |c| match c.0 {
                2 => format!("ymm{}h[{}]", (at - c.1) / 16, at % 16),
                5 => format!("k{}[{}]", (at - c.1) / 8, at % 8),
                6 => format!("zmm{}h[{}]", (at - c.1) / 32, at % 32),
                _ => format!("zmm{}[{}]", 16 + (at - c.1) / 64, at % 64),
            },
        ),
    }
}

/// The differences, one per line; empty if there are none. `undefined`: status flags not to be compared.
pub fn differences(native: &Outcome, guest: &Outcome, undefined: u64) -> String {
    let mut out = String::new();
    let mut line = |name: &str, a: u64, b: u64| {
        if a != b {
            let _ = writeln!(out, "  {name:8} host {a:#018x}  interp {b:#018x}");
        }
    };
    line("vector", native.vector.into(), guest.vector.into());
    line("error", native.error, guest.error);
    line("cr2", native.cr2, guest.cr2);
    line("rip", native.regs.rip, guest.regs.rip);
    line("rflags", native.regs.rflags & !undefined, guest.regs.rflags & !undefined);
    for (i, name) in NAMES.iter().enumerate() {
        line(name, native.regs.gpr[i], guest.regs.gpr[i]);
    }
    if native.regs.fpu != guest.regs.fpu {
        let bytes = native.regs.fpu.iter().zip(guest.regs.fpu.iter()).enumerate();
        for (at, (a, b)) in bytes.filter(|(_, (a, b))| a != b).take(24) {
            line(&area_name(at), u64::from(*a), u64::from(*b));
        }
    }
    if native.data != guest.data {
        let bytes = native.data.iter().zip(&guest.data).enumerate();
        for (at, (a, b)) in bytes.filter(|(_, (a, b))| a != b).take(24) {
            line(&format!("[{:#x}]", DATA + at as u64), u64::from(*a), u64::from(*b));
        }
    }
    out
}

/// Registers side by side.
pub fn print_registers(title: &str, columns: &[(&str, &Registers)]) -> String {
    let mut out = format!("{title}\n         ");
    for (name, _) in columns {
        let _ = write!(out, "{name:>20}");
    }
    out.push('\n');
    let mut row = |name: &str, get: &dyn Fn(&Registers) -> u64| {
        let _ = write!(out, "  {name:7}");
        for (_, r) in columns {
            let _ = write!(out, "  {:#018x}", get(r));
        }
        out.push('\n');
    };
    for (i, name) in NAMES.iter().enumerate() {
        row(name, &|r| r.gpr[i]);
    }
    row("rip", &|r| r.rip);
    row("rflags", &|r| r.rflags);
    row("fcw,fsw", &|r| u64::from(u32::from_le_bytes([r.fpu[0], r.fpu[1], r.fpu[2], r.fpu[3]])));
    row("mxcsr", &|r| u64::from(u32::from_le_bytes([r.fpu[24], r.fpu[25], r.fpu[26], r.fpu[27]])));
    out
}

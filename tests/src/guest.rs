//! The smallest kernels: a multiboot 1 image around a few instructions (multiboot 0.6.96 3.1).

/// Where the image is loaded.
const BASE: u32 = 0x10_0000;
/// Bytes of the header.
const HEADER: u32 = 32;
const MAGIC: u32 = 0x1bad_b002;
/// Flag 16: the header says where the image belongs.
const ADDRESSES: u32 = 1 << 16;

/// A kernel that executes `code` in 32-bit protected mode, flat, interrupts off, without a stack.
#[must_use]
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    let len = u32::try_from(code.len()).expect("a small kernel");
    let end = BASE + HEADER + len;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES);
    let header = [MAGIC, ADDRESSES, checksum, BASE, BASE, end, end, BASE + HEADER];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend_from_slice(code);
    image
}

/// `mov eax, value; mov dx, port; out dx, eax|ax|al` by size in bytes.
#[must_use]
pub fn out(port: u16, size: u8, value: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend_from_slice(&value.to_le_bytes());
    code.extend_from_slice(&[0x66, 0xba]);
    code.extend_from_slice(&port.to_le_bytes());
    code.extend_from_slice(match size {
        1 => &[0xee],
        2 => &[0x66, 0xef],
        _ => &[0xef],
    });
    code
}

/// `cli; hlt; jmp` back to it.
pub const STOP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfc];
/// `jmp` to itself, interrupts being off.
pub const SPIN: &[u8] = &[0xeb, 0xfe];

/// Power off by ACPI: SLP_EN in PM1a control.
#[must_use]
pub fn power_off() -> Vec<u8> {
    let mut code = out(0x604, 2, 0x2000);
    code.extend_from_slice(STOP);
    code
}

//! The smallest `/init`: a static ELF program of two system calls that prints `REACHED-INIT` and powers the machine off.
//!
//! It is what boot time is measured with, so it must cost nothing itself: no shell, no loader, no mounts.

use super::Arch;

/// The line that the program prints on the console.
pub const MESSAGE: &[u8] = b"REACHED-INIT\n";

/// Where the one segment of the program is mapped.
const BASE: u32 = 0x40_0000;

/// Arguments of `reboot(2)`: LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF.
const REBOOT: [u32; 3] = [0xfee1_dead, 672_274_793, 0x4321_fedc];

/// The program, for the architecture of the kernel that is to run it.
#[must_use]
pub fn elf(arch: Arch) -> Vec<u8> {
    match arch {
        Arch::Amd64 => elf64(),
        Arch::I386 => elf32(),
    }
}

/// Appends `opcode imm32`.
fn op(code: &mut Vec<u8>, opcode: u8, immediate: u32) {
    code.push(opcode);
    code.extend_from_slice(&immediate.to_le_bytes());
}

/// MESSAGE's length as the system calls take it.
fn message_len() -> u32 {
    u32::try_from(MESSAGE.len()).expect("the message is short")
}

/// The instructions for amd64; `message` is the address of [`MESSAGE`].
fn code64(message: u32) -> Vec<u8> {
    let mut code = Vec::new();
    op(&mut code, 0xb8, 1); // mov eax, SYS_write
    op(&mut code, 0xbf, 1); // mov edi, stdout
    op(&mut code, 0xbe, message); // mov esi, message
    op(&mut code, 0xba, message_len()); // mov edx, length
    code.extend_from_slice(&[0x0f, 0x05]); // syscall
    op(&mut code, 0xb8, 169); // mov eax, SYS_reboot
    op(&mut code, 0xbf, REBOOT[0]);
    op(&mut code, 0xbe, REBOOT[1]);
    op(&mut code, 0xba, REBOOT[2]);
    code.extend_from_slice(&[0x0f, 0x05, 0xeb, 0xfe]); // syscall; jmp $
    code
}

/// The instructions for i386.
fn code32(message: u32) -> Vec<u8> {
    let mut code = Vec::new();
    op(&mut code, 0xb8, 4); // mov eax, __NR_write
    op(&mut code, 0xbb, 1); // mov ebx, stdout
    op(&mut code, 0xb9, message); // mov ecx, message
    op(&mut code, 0xba, message_len()); // mov edx, length
    code.extend_from_slice(&[0xcd, 0x80]); // int 0x80
    op(&mut code, 0xb8, 88); // mov eax, __NR_reboot
    op(&mut code, 0xbb, REBOOT[0]);
    op(&mut code, 0xb9, REBOOT[1]);
    op(&mut code, 0xba, REBOOT[2]);
    code.extend_from_slice(&[0xcd, 0x80, 0xeb, 0xfe]); // int 0x80; jmp $
    code
}

/// The first bytes of both headers: magic, class, little endian, version, then type EXEC, machine, version.
fn identification(class: u8, machine: u16) -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', class, 1, 1, 0];
    bytes.resize(16, 0);
    bytes.extend_from_slice(&2u16.to_le_bytes());
    bytes.extend_from_slice(&machine.to_le_bytes());
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes
}

fn push_u16s(bytes: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
}

fn push_u32s(bytes: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
}

fn push_u64s(bytes: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
}

/// ELF64: header 64 bytes, one program header of 56, code, message.
fn elf64() -> Vec<u8> {
    const HEADERS: u32 = 64 + 56;
    let code_len = u32::try_from(code64(0).len()).expect("a few instructions");
    let code = code64(BASE + HEADERS + code_len);
    let base = u64::from(BASE);
    let size = u64::from(HEADERS + code_len + message_len());
    let mut bytes = identification(2, 62);
    push_u64s(&mut bytes, &[base + u64::from(HEADERS), 64, 0]); // e_entry, e_phoff, e_shoff
    push_u32s(&mut bytes, &[0]); // e_flags
    push_u16s(&mut bytes, &[64, 56, 1, 0, 0, 0]); // e_ehsize, e_phentsize, e_phnum, no sections
    push_u32s(&mut bytes, &[1, 5]); // PT_LOAD, PF_R | PF_X
    push_u64s(&mut bytes, &[0, base, base, size, size, 0x1000]);
    bytes.extend_from_slice(&code);
    bytes.extend_from_slice(MESSAGE);
    bytes
}

/// ELF32: header 52 bytes, one program header of 32, code, message.
fn elf32() -> Vec<u8> {
    const HEADERS: u32 = 52 + 32;
    let code_len = u32::try_from(code32(0).len()).expect("a few instructions");
    let code = code32(BASE + HEADERS + code_len);
    let size = HEADERS + code_len + message_len();
    let mut bytes = identification(1, 3);
    push_u32s(&mut bytes, &[BASE + HEADERS, 52, 0, 0]); // e_entry, e_phoff, e_shoff, e_flags
    push_u16s(&mut bytes, &[52, 32, 1, 0, 0, 0]);
    push_u32s(&mut bytes, &[1, 0, BASE, BASE, size, size, 5, 0x1000]);
    bytes.extend_from_slice(&code);
    bytes.extend_from_slice(MESSAGE);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_long_as_they_say() {
        assert_eq!(elf64().len(), 64 + 56 + code64(0).len() + MESSAGE.len());
        assert_eq!(elf32().len(), 52 + 32 + code32(0).len() + MESSAGE.len());
    }

    #[test]
    fn message_address_points_at_the_message() {
        for (bytes, headers, at) in [(elf64(), 120, 11), (elf32(), 84, 11)] {
            let operand = &bytes[headers + at..headers + at + 4];
            let address = u32::from_le_bytes(operand.try_into().expect("four bytes"));
            let offset = usize::try_from(address - BASE).expect("small");
            assert_eq!(&bytes[offset..], MESSAGE);
        }
    }
}

//! Interrupt vector table, BIOS data area, extended BIOS data area and the real-mode code they point to, as an IBM PC
//! BIOS leaves them (Phoenix "System BIOS for IBM PCs, Compatibles, and EISA Computers", data area and vectors).
//!
//! BIOS services are not there: their vectors lead to a stub that sets the carry flag and AH = 86H ("unsupported").
//! Two that only read the data area work: INT 11H (equipment) and INT 12H (memory size).

use guestmem::{Gpa, GuestMemory, Unbacked};

use crate::boot::Platform;
use crate::boot::layout::{BIOS_STUBS, EBDA};

/// Real-mode segment of the stubs.
const SEGMENT: u16 = 0xf000;
const COM1: u16 = 0x3f8;
const CRTC_COLOR: u16 = 0x3d4;

/// A piece of code at an offset in [`SEGMENT`].
struct Stub {
    offset: u16,
    code: &'static [u8],
}

/// `iret`
const RETURN: Stub = Stub { offset: 0xe000, code: &[0xcf] };
/// `push ax; mov al,20h; out 20h,al; pop ax; iret`: end of interrupt.
const MASTER: Stub = Stub { offset: 0xe010, code: &[0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf] };
/// The same for both interrupt controllers.
const SLAVE: Stub = Stub { offset: 0xe020, code: &[0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf] };
/// `mov ah,86h; push bp; mov bp,sp; or byte [bp+6],1; pop bp; iret`: carry in the caller's flags.
const UNSUPPORTED: Stub =
    Stub { offset: 0xe030, code: &[0xb4, 0x86, 0x55, 0x89, 0xe5, 0x80, 0x4e, 0x06, 0x01, 0x5d, 0xcf] };
/// `push ds; mov ax,40h; mov ds,ax; mov ax,[10h]; pop ds; iret`
const EQUIPMENT: Stub =
    Stub { offset: 0xe040, code: &[0x1e, 0xb8, 0x40, 0x00, 0x8e, 0xd8, 0xa1, 0x10, 0x00, 0x1f, 0xcf] };
/// The same with `mov ax,[13h]`.
const MEMORY_SIZE: Stub =
    Stub { offset: 0xe050, code: &[0x1e, 0xb8, 0x40, 0x00, 0x8e, 0xd8, 0xa1, 0x13, 0x00, 0x1f, 0xcf] };
/// `mov dx,0cf9h; mov al,6; out dx,al; hlt; jmp $-1`: resets the machine.
const RESET: Stub = Stub { offset: 0xe060, code: &[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd] };
/// `jmp f000h:e060h`, then the BIOS date and the model byte (AT) at their traditional places.
const RESET_VECTOR: Stub = Stub { offset: 0xfff0, code: b"\xea\x60\xe0\x00\xf004/01/14\0\xfc" };

const STUBS: [&Stub; 8] =
    [&RETURN, &MASTER, &SLAVE, &UNSUPPORTED, &EQUIPMENT, &MEMORY_SIZE, &RESET, &RESET_VECTOR];

/// Which stub an interrupt vector leads to.
const fn stub_of(vector: u8) -> &'static Stub {
    match vector {
        0x08..=0x0f => &MASTER,
        0x11 => &EQUIPMENT,
        0x12 => &MEMORY_SIZE,
        0x10 | 0x13..=0x17 | 0x1a => &UNSUPPORTED,
        0x18 | 0x19 => &RESET,
        0x70..=0x77 => &SLAVE,
        _ => &RETURN,
    }
}

/// Writes all of it.
pub(super) fn write(mem: &GuestMemory, platform: &Platform) -> Result<(), Unbacked> {
    let mut vectors = Vec::with_capacity(1024);
    for vector in 0..=255 {
        vectors.extend_from_slice(&stub_of(vector).offset.to_le_bytes());
        vectors.extend_from_slice(&SEGMENT.to_le_bytes());
    }
    mem.write(Gpa(0), &vectors)?;
    mem.write(Gpa(0x400), &data_area(platform))?;
    mem.fill(Gpa(EBDA), 0x400, 0)?;
    mem.write(Gpa(EBDA), &[1])?; // its size in KiB
    for stub in STUBS {
        debug_assert!(BIOS_STUBS.contains(&address(stub)), "stubs lie in their range");
        mem.write(Gpa(address(stub)), stub.code)?;
    }
    Ok(())
}

fn address(stub: &Stub) -> u64 {
    (u64::from(SEGMENT) << 4) + u64::from(stub.offset)
}

/// The data area at 400H.
fn data_area(platform: &Platform) -> [u8; 256] {
    let mut area = [0; 256];
    let mut word = |at: usize, value: u16| area[at..at + 2].copy_from_slice(&value.to_le_bytes());
    word(0x00, COM1);
    word(0x0e, u16::try_from(EBDA >> 4).unwrap_or(0));
    // Coprocessor, pointing device, one serial port; 80 by 25 colour text.
    word(0x10, 1 << 1 | 1 << 2 | 1 << 9 | if platform.vga { 2 << 4 } else { 0 });
    word(0x13, u16::try_from(EBDA >> 10).unwrap_or(0));
    word(0x1a, 0x1e); // keyboard buffer: head, tail, start, end
    word(0x1c, 0x1e);
    word(0x80, 0x1e);
    word(0x82, 0x3e);
    if platform.vga {
        word(0x4a, 80); // columns
        word(0x4c, 0x1000); // bytes in a page
        word(0x60, 0x0d0e); // cursor's last and first line
        word(0x63, CRTC_COLOR);
        word(0x85, 16); // lines of a character
        area[0x49] = 3; // video mode
        area[0x65] = 0x29; // mode control
        area[0x66] = 0x30; // palette
        area[0x84] = 24; // rows - 1
        area[0x87] = 0x60; // EGA: 256 KiB, active
        area[0x89] = 0x11; // VGA active, 400 lines
    }
    area[0x96] = 0x10; // 101-key keyboard
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stubs_do_not_overlap() {
        for pair in STUBS.windows(2) {
            assert!(usize::from(pair[0].offset) + pair[0].code.len() <= usize::from(pair[1].offset));
        }
        assert_eq!(address(&RESET_VECTOR) + RESET_VECTOR.code.len() as u64, 0xf_ffff);
    }

    #[test]
    fn data_area_names_memory_and_console() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        write(&mem, &Platform::default()).unwrap();
        let word = |at: u64| mem.load_gpa::<u16>(Gpa(at)).unwrap();
        assert_eq!([0x400, 0x40e, 0x413, 0x463, 0x44a].map(word), [0x3f8, 0x9fc0, 639, 0x3d4, 80]);
        assert_eq!((word(0x10 * 4), word(0x10 * 4 + 2)), (0xe030, 0xf000));
        assert_eq!(mem.load_gpa::<u8>(Gpa(0xf_fff0)), Some(0xea));
        assert_eq!(mem.load_gpa::<u8>(Gpa(0xf_fffe)), Some(0xfc));
    }
}

//! A VGA in text mode (IBM "VGA Technical Reference"; registers as in "PS/2 Hardware Interface Technical
//! Reference", Video Subsystem): memory 0xa0000–0xbffff and ports 0x3b4–0x3df.
//!
//! The machine starts as firmware leaves it: mode 3, 80 by 25, colour. [`Vga::text_screen`] reads what is
//! shown through the CRTC's start address, offset and cursor; [`Vga::generation`] says whether anything
//! visible may have changed since.
//!
// DEVIATION: the memory is 128 KiB of plain bytes: no planes, write modes, latches or chaining, and no
// graphics is displayed. A guest that draws in graphics modes sees what it wrote but shows nothing, and a
// font that it loads is not used. Kernels probe and use only text memory before they find a better display.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use x86::addr::Gpa;

use super::text_screen::{Cell, TextScreen};
use super::{BytePorts, attach_ports, unfit};
use crate::bus::{Bus, MmioDevice, Overlap};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// First byte of video memory.
pub const VRAM: Gpa = Gpa(0xa0000);
/// Its length in bytes.
pub const VRAM_LEN: usize = 0x20000;
const TEXT: usize = 0x18000;
const TEXT_LEN: usize = 0x8000;

const CRTC_REGS: usize = 25;
const CRTC_DISPLAY_END: usize = 0x01;
const CRTC_OVERFLOW: usize = 0x07;
const CRTC_SCAN_LINES: usize = 0x09;
const CRTC_CURSOR_START: usize = 0x0a;
const CRTC_CURSOR_END: usize = 0x0b;
const CRTC_START: usize = 0x0c;
const CRTC_CURSOR: usize = 0x0e;
const CRTC_PROTECT: usize = 0x11;
const CRTC_ROWS_END: usize = 0x12;
const CRTC_OFFSET: usize = 0x13;

/// CRTC registers of mode 3 ("Default values", 80 by 25 with 9 by 16 characters).
const MODE_3_CRTC: [u8; CRTC_REGS] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c,
    0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
];
const MODE_3_ATTRIBUTE: [u8; 21] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c,
    0x00, 0x0f, 0x08, 0x00,
];
const MODE_3_SEQUENCER: [u8; 5] = [0x03, 0x00, 0x03, 0x00, 0x02];
const MODE_3_GRAPHICS: [u8; 9] = [0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x00, 0xff];
const MODE_3_MISC: u8 = 0x67;

/// Index and registers of one controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Bank {
    index: u8,
    regs: Vec<u8>,
}

impl Bank {
    fn new(regs: &[u8]) -> Self {
        Self { index: 0, regs: regs.to_vec() }
    }

    fn read(&self) -> u8 {
        self.regs.get(usize::from(self.index)).copied().unwrap_or(0)
    }

    fn write(&mut self, value: u8) {
        if let Some(reg) = self.regs.get_mut(usize::from(self.index)) {
            *reg = value;
        }
    }
}

/// The palette converter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Dac {
    mask: u8,
    /// 256 times red, green, blue, six bits each.
    palette: Vec<u8>,
    /// Position in `palette` of the next byte to read and to write.
    read_at: u16,
    write_at: u16,
    reading: bool,
}

impl Dac {
    const LEN: u16 = 768;

    /// The 64 colours of the EGA, four times, as firmware loads them for text.
    fn new() -> Self {
        let level = |color: u8, bit: u8| (color >> bit & 1) * 42 + (color >> (bit + 3) & 1) * 21;
        let palette =
            (0..=255u8).flat_map(|color| [level(color, 2), level(color, 1), level(color, 0)]).collect();
        Self { mask: 0xff, palette, read_at: 0, write_at: 0, reading: false }
    }

    fn read(&mut self) -> u8 {
        let byte = self.palette.get(usize::from(self.read_at)).copied().unwrap_or(0);
        self.read_at = (self.read_at + 1) % Self::LEN;
        byte
    }

    fn write(&mut self, value: u8) {
        if let Some(byte) = self.palette.get_mut(usize::from(self.write_at)) {
            *byte = value & 0x3f;
        }
        self.write_at = (self.write_at + 1) % Self::LEN;
    }

    fn is_valid(&self) -> bool {
        self.palette.len() == usize::from(Self::LEN) && self.read_at < Self::LEN && self.write_at < Self::LEN
    }
}

/// Bytes as a hexadecimal string: video memory would be half a megabyte as a list of numbers.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
        let text: String = bytes.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte)]).collect();
        serializer.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let nibble = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let pair = |pair: &[u8]| match pair {
            &[high, low] => Some(nibble(high)? << 4 | nibble(low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.ok_or_else(|| Error::custom("not a string of hexadecimal byte pairs"))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VgaState {
    #[serde(with = "hex")]
    vram: Vec<u8>,
    crtc: Bank,
    sequencer: Bank,
    graphics: Bank,
    attribute: Bank,
    /// Port 0x3c0 takes data next.
    attribute_data_next: bool,
    dac: Dac,
    misc: u8,
    feature: u8,
    enabled: u8,
    /// Input status 1: display and retrace bits toggle with each read.
    status_1: u8,
}

impl VgaState {
    fn new() -> Self {
        let mut vram = vec![0; VRAM_LEN];
        vram[TEXT..].chunks_exact_mut(2).for_each(|cell| cell.copy_from_slice(&[b' ', 0x07]));
        Self {
            vram,
            crtc: Bank::new(&MODE_3_CRTC),
            sequencer: Bank::new(&MODE_3_SEQUENCER),
            graphics: Bank::new(&MODE_3_GRAPHICS),
            attribute: Bank { index: 0x20, ..Bank::new(&MODE_3_ATTRIBUTE) },
            attribute_data_next: false,
            dac: Dac::new(),
            misc: MODE_3_MISC,
            feature: 0,
            enabled: 1,
            status_1: 0,
        }
    }

    fn is_valid(&self) -> bool {
        self.vram.len() == VRAM_LEN
            && self.crtc.regs.len() == MODE_3_CRTC.len()
            && self.sequencer.regs.len() == MODE_3_SEQUENCER.len()
            && self.graphics.regs.len() == MODE_3_GRAPHICS.len()
            && self.attribute.regs.len() == MODE_3_ATTRIBUTE.len()
            && self.dac.is_valid()
    }

    fn crtc(&self, register: usize) -> usize {
        self.crtc.regs.get(register).copied().map_or(0, usize::from)
    }

    fn crtc_word(&self, register: usize) -> usize {
        self.crtc(register) << 8 | self.crtc(register + 1)
    }

    fn size(&self) -> (usize, usize) {
        let cols = (self.crtc(CRTC_DISPLAY_END) + 1).clamp(1, 132);
        let overflow = self.crtc(CRTC_OVERFLOW);
        let lines = self.crtc(CRTC_ROWS_END) | (overflow & 0x02) << 7 | (overflow & 0x40) << 3;
        let height = (self.crtc(CRTC_SCAN_LINES) & 0x1f) + 1;
        (cols, ((lines + 1) / height).clamp(1, 60))
    }

    fn cell(&self, at: usize) -> Cell {
        let at = TEXT + at * 2 % TEXT_LEN;
        Cell { glyph: self.vram[at], attribute: self.vram[at + 1] }
    }

    fn text_screen(&self) -> TextScreen {
        let (cols, rows) = self.size();
        let start = self.crtc_word(CRTC_START);
        let pitch = match self.crtc(CRTC_OFFSET) * 2 {
            0 => cols,
            pitch => pitch,
        };
        let cells = (0..rows * cols).map(|i| self.cell(start + i / cols * pitch + i % cols)).collect();
        let cursor_start = self.crtc(CRTC_CURSOR_START);
        let visible = cursor_start & 0x20 == 0 && cursor_start & 0x1f <= self.crtc(CRTC_CURSOR_END) & 0x1f;
        let at = self.crtc_word(CRTC_CURSOR).wrapping_sub(start) & 0x3fff;
        let cursor = (at % pitch, at / pitch);
        let on_screen = cursor.0 < cols && cursor.1 < rows;
        TextScreen { cells, cursor: (visible && on_screen).then_some(cursor), cols, rows }
    }

    /// Whether the ports of colour (0x3dx) or monochrome (0x3bx) answer.
    fn is_colour(&self) -> bool {
        self.misc & 1 != 0
    }

    fn write_attribute(&mut self, value: u8) {
        let to_data = self.attribute_data_next;
        self.attribute_data_next = !to_data;
        if !to_data {
            self.attribute.index = value & 0x3f;
            return;
        }
        let index = usize::from(self.attribute.index & 0x1f);
        if let Some(reg) = self.attribute.regs.get_mut(index) {
            *reg = value;
        }
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.crtc.index);
        let protected = self.crtc(CRTC_PROTECT) & 0x80 != 0 && index < 8;
        if !protected {
            self.crtc.write(value);
        } else if index == CRTC_OVERFLOW {
            // Bit 4 (line compare) is not protected.
            let old = self.crtc.read();
            self.crtc.write(old & !0x10 | value & 0x10);
        }
    }
}

/// The display adapter.
pub struct Vga {
    state: VgaState,
    generation: u64,
}

impl Vga {
    const NAME: &'static str = "vga";
    const VERSION: u32 = 1;

    /// A display in mode 3, blank.
    pub fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { state: VgaState::new(), generation: 0 }))
    }

    /// Puts the display on the bus.
    ///
    /// # Errors
    /// When a port or the memory is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        let ports = [(0x3b4, 2), (0x3ba, 1), (0x3c0, 16), (0x3d4, 2), (0x3da, 1)];
        attach_ports(bus, this, &ports)?;
        bus.add_mmio(VRAM, VRAM_LEN as u64, Arc::clone(this) as _)
    }

    /// The state after a machine reset: firmware sets mode 3 and clears the screen.
    pub fn reset(&mut self) {
        self.state = VgaState::new();
        self.generation += 1;
    }

    /// Changes whenever what is shown may have changed.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a text mode is set (graphics controller, miscellaneous, bit 0).
    #[must_use]
    pub fn is_text(&self) -> bool {
        self.state.graphics.regs.get(6).is_none_or(|misc| misc & 1 == 0)
    }

    /// What is shown.
    #[must_use]
    pub fn text_screen(&self) -> TextScreen {
        self.state.text_screen()
    }

    /// What is shown, as plain text.
    #[must_use]
    pub fn screendump(&self) -> String {
        self.text_screen().to_text()
    }

    fn read_register(&mut self, port: u16) -> u8 {
        let state = &mut self.state;
        match port {
            0x3c0 => state.attribute.index,
            0x3c1 => {
                let index = usize::from(state.attribute.index & 0x1f);
                state.attribute.regs.get(index).copied().unwrap_or(0)
            }
            // Input status 0: the switch sense that says "a colour monitor is there".
            0x3c2 => 0x10,
            0x3c3 => state.enabled,
            0x3c4 => state.sequencer.index,
            0x3c5 => state.sequencer.read(),
            0x3c6 => state.dac.mask,
            0x3c7 => {
                if state.dac.reading {
                    3
                } else {
                    0
                }
            }
            0x3c8 => (state.dac.write_at / 3).to_le_bytes()[0],
            0x3c9 => state.dac.read(),
            0x3ca => state.feature,
            0x3cc => state.misc,
            0x3ce => state.graphics.index,
            0x3cf => state.graphics.read(),
            0x3b4 | 0x3d4 => state.crtc.index,
            0x3b5 | 0x3d5 => state.crtc.read(),
            0x3ba | 0x3da => {
                state.attribute_data_next = false;
                state.status_1 ^= 0x09;
                state.status_1
            }
            _ => 0xff,
        }
    }

    fn write_register(&mut self, port: u16, value: u8) {
        let state = &mut self.state;
        match port {
            0x3c0 => state.write_attribute(value),
            0x3c2 => state.misc = value,
            0x3c3 => state.enabled = value & 1,
            0x3c4 => state.sequencer.index = value & 7,
            0x3c5 => state.sequencer.write(value),
            0x3c6 => state.dac.mask = value,
            0x3c7 => {
                state.dac.read_at = u16::from(value) * 3;
                state.dac.reading = true;
            }
            0x3c8 => {
                state.dac.write_at = u16::from(value) * 3;
                state.dac.reading = false;
            }
            0x3c9 => state.dac.write(value),
            0x3ce => state.graphics.index = value & 15,
            0x3cf => state.graphics.write(value),
            0x3b4 | 0x3d4 => state.crtc.index = value & 0x3f,
            0x3b5 | 0x3d5 => {
                state.write_crtc(value);
                self.generation += 1;
            }
            0x3ba | 0x3da => state.feature = value,
            _ => {}
        }
    }

    /// Whether a CRTC port belongs to the addresses that do not answer now.
    fn is_hidden(&self, port: u16) -> bool {
        match port {
            0x3b0..=0x3bf => self.state.is_colour(),
            0x3d0..=0x3df => !self.state.is_colour(),
            _ => false,
        }
    }
}

impl BytePorts for Vga {
    fn read8(&mut self, port: u16) -> u8 {
        if self.is_hidden(port) { 0xff } else { self.read_register(port) }
    }

    fn write8(&mut self, port: u16, value: u8) {
        if !self.is_hidden(port) {
            self.write_register(port, value);
        }
    }
}

impl MmioDevice for Vga {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        match self.state.vram.get(from..from.saturating_add(data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let to = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self.state.vram.get_mut(to..to.saturating_add(data.len()))
            && bytes != data
        {
            bytes.copy_from_slice(data);
            self.generation += 1;
        }
    }
}

impl Snapshot for Vga {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: VgaState = from_blob(Self::NAME, Self::VERSION, blob)?;
        if !state.is_valid() {
            return Err(unfit(Self::NAME, "memory, palette or a register bank has the wrong size"));
        }
        self.state = state;
        self.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, Noise, hammer_ports};
    use super::*;
    use crate::bus::lock;

    fn put(vga: &Mutex<Vga>, cell: u64, text: &str) {
        for (i, byte) in (0..).zip(text.bytes()) {
            lock(vga).mmio_write(0x18000 + (cell + i) * 2, &[byte, 0x1f]);
        }
    }

    fn crtc(vga: &Mutex<Vga>, register: u8, value: u8) {
        lock(vga).write8(0x3d4, register);
        lock(vga).write8(0x3d5, value);
    }

    #[test]
    fn fresh_screen_is_80_by_25_and_blank() {
        let vga = Vga::new();
        let screen = lock(&vga).text_screen();
        assert_eq!((screen.cols, screen.rows, screen.cursor), (80, 25, Some((0, 0))));
        assert_eq!(lock(&vga).screendump(), "\n".repeat(25));
        assert!(lock(&vga).is_text());
    }

    #[test]
    fn written_text_and_cursor_are_shown() {
        let vga = Vga::new();
        let before = lock(&vga).generation();
        put(&vga, 80, "Hello");
        crtc(&vga, 0x0f, 85);
        assert_ne!(lock(&vga).generation(), before);
        let screen = lock(&vga).text_screen();
        assert_eq!(screen.cells[80], Cell { glyph: b'H', attribute: 0x1f });
        assert_eq!(screen.cursor, Some((5, 1)));
        assert!(lock(&vga).screendump().starts_with("\nHello\n"));
        crtc(&vga, 0x0a, 0x20);
        assert_eq!(lock(&vga).text_screen().cursor, None);
    }

    #[test]
    fn start_address_scrolls_and_wraps() {
        let vga = Vga::new();
        put(&vga, 0, "top");
        put(&vga, 160, "third");
        crtc(&vga, 0x0d, 160);
        assert!(lock(&vga).screendump().starts_with("third\n"));
        crtc(&vga, 0x0c, 0x3f);
        crtc(&vga, 0x0d, 0xb0);
        assert!(lock(&vga).screendump().starts_with("\ntop\n"), "0x4000 cells wrap");
    }

    #[test]
    fn same_byte_written_again_is_no_change() {
        let vga = Vga::new();
        put(&vga, 0, "x");
        let before = lock(&vga).generation();
        put(&vga, 0, "x");
        assert_eq!(lock(&vga).generation(), before);
    }

    #[test]
    fn crtc_protected_registers_keep_their_values() {
        let vga = Vga::new();
        crtc(&vga, 0x01, 0x27);
        assert_eq!(lock(&vga).text_screen().cols, 80);
        crtc(&vga, 0x11, 0x0e);
        crtc(&vga, 0x01, 0x27);
        assert_eq!(lock(&vga).text_screen().cols, 40);
    }

    #[test]
    fn attribute_flip_flop_is_reset_by_status_read() {
        let vga = Vga::new();
        let mut vga = lock(&vga);
        vga.write8(0x3c0, 0x10);
        vga.read8(0x3da);
        vga.write8(0x3c0, 0x11);
        vga.write8(0x3c0, 0x2a);
        assert_eq!(vga.read8(0x3c1), 0x2a);
        let status = vga.read8(0x3da);
        assert_eq!(vga.read8(0x3da) ^ status, 0x09, "a wait for retrace ends");
    }

    #[test]
    fn palette_is_written_and_read_by_threes() {
        let vga = Vga::new();
        let mut vga = lock(&vga);
        vga.write8(0x3c8, 5);
        [1, 2, 3, 4].iter().for_each(|&byte| vga.write8(0x3c9, byte));
        vga.write8(0x3c7, 5);
        assert_eq!([0; 4].map(|_: u8| vga.read8(0x3c9)), [1, 2, 3, 4]);
    }

    #[test]
    fn monochrome_ports_answer_only_in_monochrome() {
        let vga = Vga::new();
        let mut vga = lock(&vga);
        vga.write8(0x3d4, 0x0e);
        assert_eq!((vga.read8(0x3d4), vga.read8(0x3b4)), (0x0e, 0xff));
        vga.write8(0x3c2, 0x66);
        assert_eq!((vga.read8(0x3d4), vga.read8(0x3b4)), (0xff, 0x0e));
    }

    #[test]
    fn restore_shows_the_same_screen() {
        let a = Vga::new();
        put(&a, 3, "saved");
        let blob = lock(&a).save();
        let b = Vga::new();
        lock(&b).restore(&blob).unwrap();
        assert_eq!(lock(&b).text_screen(), lock(&a).text_screen());
        for vram in ["00", "0", "zz", "ää"] {
            let mut bad = blob.clone();
            bad.data["vram"] = vram.into();
            assert!(lock(&b).restore(&bad).is_err());
        }
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let vga = Vga::new();
        let ports: Vec<u16> = (0x3b4..0x3e0).collect();
        let mut noise = Noise(11);
        for _ in 0..200 {
            hammer_ports(&Bench::new(), &vga, &ports, 200);
            let word = noise.next();
            lock(&vga).mmio_write(word % 0x20000, &word.to_le_bytes());
            lock(&vga).mmio_read(word % 0x20000, &mut [0; 8]);
            let screen = lock(&vga).text_screen();
            assert_eq!(screen.cells.len(), screen.cols * screen.rows);
        }
    }
}

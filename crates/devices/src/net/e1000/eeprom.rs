//! The card's EEPROM: 64 words behind the four wires of EECD (Microwire, 5.3 and 13.4.3), or by EERD (13.4.4).

use serde::{Deserialize, Serialize};

use hostnet::Mac;

/// Words.
const WORDS: usize = 64;
/// All words sum to this (5.6.35).
const SUM: u16 = 0xbaba;
/// Bits of a Microwire address for so many words.
const ADDRESS_BITS: u8 = 6;
/// The opcode of a read, behind its start bit.
const READ: u16 = 0b10;

/// EECD.
mod eecd {
    pub const CLOCK: u32 = 1;
    pub const SELECT: u32 = 1 << 1;
    pub const DATA_IN: u32 = 1 << 2;
    pub const DATA_OUT: u32 = 1 << 3;
    pub const REQUEST: u32 = 1 << 6;
    pub const GRANT: u32 = 1 << 7;
    pub const PRESENT: u32 = 1 << 8;
    /// What software sets.
    pub const WRITABLE: u32 = CLOCK | SELECT | DATA_IN | REQUEST | 3 << 4;
}
/// EERD: start, done, and where address and data lie.
const EERD_START: u32 = 1;
const EERD_DONE: u32 = 1 << 4;

/// What has come over the wires since the chip was selected.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Wires {
    /// EECD as software last wrote it.
    eecd: u32,
    /// Bits shifted in, with the start bit, and how many.
    bits: u16,
    count: u8,
    /// Bits still to be shifted out of the word that is being read, which begins with a zero.
    left: u8,
    word: u16,
}

/// The EEPROM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Eeprom {
    words: Vec<u16>,
    wires: Wires,
    eerd: u32,
}

impl Eeprom {
    /// One for a card with the address `mac` (5.6, table 5-2).
    pub fn new(mac: Mac, device: u16, vendor: u16) -> Self {
        let mut words = vec![0; WORDS];
        for (word, bytes) in words.iter_mut().zip(mac.chunks(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        // Compatibility, printed board number (none), initialisation control 1: ids are valid.
        words[3] = 0x0210;
        words[8] = 0xffff;
        words[9] = 0xffff;
        words[10] = 0x400b;
        (words[11], words[12], words[13], words[14]) = (device, vendor, device, vendor);
        words[15] = 0x0008;
        let sum = words.iter().fold(0u16, |sum, &word| sum.wrapping_add(word));
        words[WORDS - 1] = SUM.wrapping_sub(sum);
        Self { words, wires: Wires::default(), eerd: 0 }
    }

    fn word(&self, address: usize) -> u16 {
        self.words.get(address).copied().unwrap_or(0xffff)
    }

    pub fn eecd(&self) -> u32 {
        let wires = &self.wires;
        let grant = if wires.eecd & eecd::REQUEST != 0 { eecd::GRANT } else { 0 };
        // The line is pulled up while the chip has nothing to say.
        let high = wires.left == 0 || wires.left <= 16 && wires.word >> (wires.left - 1) & 1 != 0;
        wires.eecd | grant | eecd::PRESENT | if high { eecd::DATA_OUT } else { 0 }
    }

    pub fn set_eecd(&mut self, value: u32) {
        let before = std::mem::replace(&mut self.wires.eecd, value & eecd::WRITABLE);
        if value & eecd::SELECT == 0 {
            self.wires = Wires { eecd: self.wires.eecd, ..Wires::default() };
        } else if before & eecd::CLOCK == 0 && value & eecd::CLOCK != 0 {
            self.clock(value & eecd::DATA_IN != 0);
        }
    }

    /// A rising edge of the clock while the chip is selected.
    fn clock(&mut self, bit: bool) {
        let wires = &mut self.wires;
        if wires.left > 0 {
            wires.left -= 1;
            return;
        }
        // Zeros before the start bit are nothing.
        if wires.count == 0 && !bit {
            return;
        }
        wires.bits = wires.bits << 1 | u16::from(bit);
        wires.count += 1;
        if wires.count == 3 + ADDRESS_BITS {
            let address = wires.bits & ((1 << ADDRESS_BITS) - 1);
            let opcode = wires.bits >> ADDRESS_BITS & 3;
            (wires.bits, wires.count) = (0, 0);
            if opcode == READ {
                self.wires.word = self.word(usize::from(address));
                self.wires.left = 17;
            }
        }
    }

    pub const fn eerd(&self) -> u32 {
        self.eerd
    }

    /// A read takes no time.
    pub fn set_eerd(&mut self, value: u32) {
        let address = value >> 8 & 0xff;
        self.eerd = value & 0xff00;
        if value & EERD_START != 0 {
            let word = u32::from(self.word(address as usize));
            self.eerd |= EERD_DONE | word << 16;
        }
    }

    /// The address in it.
    pub fn mac(&self) -> Mac {
        let mut mac = Mac::default();
        for (bytes, word) in mac.chunks_mut(2).zip(&self.words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        mac
    }

    /// Whether a saved one can be used.
    pub fn is_whole(&self) -> bool {
        self.words.len() == WORDS && self.wires.left <= 17 && self.wires.count < 3 + ADDRESS_BITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a word as a driver does, wire by wire.
    fn read(eeprom: &mut Eeprom, address: u16) -> u16 {
        let request = eecd::REQUEST;
        let mut pulse = |data: bool| {
            let data = if data { eecd::DATA_IN } else { 0 };
            eeprom.set_eecd(request | eecd::SELECT | data);
            eeprom.set_eecd(request | eecd::SELECT | data | eecd::CLOCK);
            let out = eeprom.eecd() & eecd::DATA_OUT != 0;
            eeprom.set_eecd(request | eecd::SELECT | data);
            out
        };
        let command = 0b110 << ADDRESS_BITS | address;
        for bit in (0..9).rev() {
            pulse(command >> bit & 1 != 0);
        }
        let word = (0..16).fold(0, |word, _| word << 1 | u16::from(pulse(false)));
        eeprom.set_eecd(request);
        word
    }

    #[test]
    fn words_come_over_the_wires_and_sum_up() {
        let mut eeprom = Eeprom::new([0x52, 0x54, 0, 1, 2, 3], 0x100e, 0x8086);
        assert_eq!(read(&mut eeprom, 0), 0x5452);
        assert_eq!(read(&mut eeprom, 2), 0x0302);
        assert_eq!(read(&mut eeprom, 11), 0x100e);
        let sum = (0..64).fold(0u16, |sum, at| sum.wrapping_add(read(&mut eeprom, at)));
        assert_eq!(sum, SUM);
        eeprom.set_eerd(1 | 2 << 8);
        assert_eq!(eeprom.eerd(), 0x0302_0200 | EERD_DONE);
        eeprom.set_eerd(1 | 200 << 8);
        assert_eq!(eeprom.eerd() >> 16, 0xffff);
    }
}

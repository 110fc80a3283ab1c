//! The card's PHY, a Marvell 88E1000 as the 82540EM has it inside (13.4.5 MDIC, chapter 11 and IEEE 802.3 clause 22): a link
//! of 1000 Mb/s, full duplex, negotiated at once.

use serde::{Deserialize, Serialize};

const CONTROL: u8 = 0;
const STATUS: u8 = 1;
const ID1: u8 = 2;
const ID2: u8 = 3;
const SPECIFIC_STATUS: u8 = 17;
const REGISTERS: usize = 32;

/// Control register: reset and restart of the negotiation clear themselves.
const SELF_CLEARING: u16 = 1 << 15 | 1 << 9;
/// Status: negotiation complete, link.
const NEGOTIATED: u16 = 1 << 5;
const LINK: u16 = 1 << 2;
/// Specific status: 1000 Mb/s, full duplex, resolved; and the link now.
const RESOLVED: u16 = 2 << 14 | 1 << 13 | 1 << 11;
const REAL_TIME_LINK: u16 = 1 << 10;

/// MDIC.
mod mdic {
    pub const OP_WRITE: u32 = 1;
    pub const OP_READ: u32 = 2;
    pub const READY: u32 = 1 << 28;
    pub const ERROR: u32 = 1 << 30;
    /// The address of the PHY inside.
    pub const INSIDE: u32 = 1;
}

/// The PHY's registers, and MDIC as it reads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Phy {
    registers: Vec<u16>,
    mdic: u32,
}

impl Default for Phy {
    fn default() -> Self {
        let mut registers = vec![0; REGISTERS];
        registers[usize::from(CONTROL)] = 1 << 12 | 1 << 8 | 1 << 6;
        // Speeds that it can do, extended status; the two of the link are put in when it is read.
        registers[usize::from(STATUS)] = 0x7949;
        registers[usize::from(ID1)] = 0x0141;
        registers[usize::from(ID2)] = 0x0c20;
        // What we and the other end advertise, and that it does 1000 Mb/s.
        registers[4] = 0x0de1;
        registers[5] = 0xcde1;
        registers[6] = 0x000d;
        registers[9] = 0x0e00;
        registers[10] = 0x3c00;
        registers[15] = 0x3000;
        registers[16] = 0x0360;
        registers[20] = 0x0d60;
        Self { registers, mdic: mdic::READY }
    }
}

impl Phy {
    pub const fn mdic(&self) -> u32 {
        self.mdic
    }

    /// An access takes no time.
    pub fn set_mdic(&mut self, value: u32, link: bool) {
        let register = u8::try_from(value >> 16 & 31).unwrap_or(0);
        let (phy, operation) = (value >> 21 & 31, value >> 26 & 3);
        self.mdic = value & 0x0fff_ffff | mdic::READY;
        match operation {
            _ if phy != mdic::INSIDE => self.mdic |= mdic::ERROR,
            mdic::OP_READ => self.mdic = self.mdic & !0xffff | u32::from(self.read(register, link)),
            mdic::OP_WRITE => self.write(register, u16::try_from(value & 0xffff).unwrap_or(0)),
            _ => self.mdic |= mdic::ERROR,
        }
    }

    fn read(&self, register: u8, link: bool) -> u16 {
        let value = self.registers.get(usize::from(register)).copied().unwrap_or(0);
        match register {
            STATUS if link => value | NEGOTIATED | LINK,
            SPECIFIC_STATUS if link => RESOLVED | REAL_TIME_LINK,
            _ => value,
        }
    }

    fn write(&mut self, register: u8, value: u16) {
        let kept = match register {
            CONTROL => value & !SELF_CLEARING,
            // Status, identification, what the other end said: not software's.
            STATUS | ID1 | ID2 | 5 | 6 | 10 | 15 | SPECIFIC_STATUS => return,
            _ => value,
        };
        if let Some(slot) = self.registers.get_mut(usize::from(register)) {
            *slot = kept;
        }
    }

    /// Whether a saved one can be used.
    pub fn is_whole(&self) -> bool {
        self.registers.len() == REGISTERS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(phy: &mut Phy, register: u32, link: bool) -> u32 {
        phy.set_mdic(mdic::OP_READ << 26 | mdic::INSIDE << 21 | register << 16, link);
        assert_eq!(phy.mdic() & (mdic::READY | mdic::ERROR), mdic::READY);
        phy.mdic() & 0xffff
    }

    #[test]
    fn phy_is_that_of_the_card_and_its_link_follows() {
        let mut phy = Phy::default();
        assert_eq!(read(&mut phy, 2, true) << 16 | read(&mut phy, 3, true), 0x0141_0c20);
        assert_eq!(read(&mut phy, 1, true) & u32::from(LINK | NEGOTIATED), u32::from(LINK | NEGOTIATED));
        assert_eq!(read(&mut phy, 1, false) & u32::from(LINK | NEGOTIATED), 0);
        // Reset is done at once, identification stays.
        phy.set_mdic(mdic::OP_WRITE << 26 | mdic::INSIDE << 21 | 0x9140, true);
        assert_eq!(read(&mut phy, 0, true), 0x1140);
        phy.set_mdic(mdic::OP_WRITE << 26 | mdic::INSIDE << 21 | 2 << 16 | 7, true);
        assert_eq!(read(&mut phy, 2, true), 0x0141);
        phy.set_mdic(mdic::OP_READ << 26 | 2 << 21, true);
        assert_ne!(phy.mdic() & mdic::ERROR, 0);
    }
}

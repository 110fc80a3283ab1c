//! The software TLB and the jump cache in the frame, as translated code reads them, and how they forget.
//!
//! Both are logged by half of the address space, so that an address-space switch costs only what was filled since the last.

#![expect(clippy::cast_possible_truncation, reason = "masked to the number of sets")]

use bt::frame;
use x86_interp::tlb::TlbEvent;

use crate::exec::Frame;

/// The tables of one frame.
pub struct Tables {
    frame: Frame,
    /// Displacements of TLB entries filled, per half.
    filled: [Vec<i32>; 2],
    /// Displacements of jump-cache entries set, per half.
    jumps: [Vec<i32>; 2],
    intact: bool,
}

const fn half(address: u64) -> usize {
    (address >> 63) as usize
}

impl Tables {
    /// Empty tables.
    pub fn new(frame: Frame) -> Self {
        let t = Self { frame, filled: Default::default(), jumps: Default::default(), intact: true };
        for user in [0, frame::TLB_STRIDE] {
            for i in 0..frame::TLB_ENTRIES as i32 {
                t.clear_entry(frame::TLB + user + 32 * i);
            }
        }
        for i in 0..frame::JUMP_ENTRIES as i32 {
            t.frame.set(frame::JUMPS + 16 * i, frame::NO_TAG);
        }
        t
    }

    fn clear_entry(&self, at: i32) {
        self.frame.set(at, frame::NO_TAG);
        self.frame.set(at + 8, frame::NO_TAG);
    }

    fn entry(la: u64, user: bool) -> i32 {
        let set = (la >> 12) as i32 & (frame::TLB_ENTRIES as i32 - 1);
        frame::TLB + if user { frame::TLB_STRIDE } else { 0 } + 32 * set
    }

    /// Remembers a translation.
    pub fn fill(&mut self, page_la: u64, user: bool, writable: bool, host: u64, gfn: u64) {
        let at = Self::entry(page_la, user);
        self.frame.set(at, page_la);
        self.frame.set(at + 8, if writable { page_la } else { frame::NO_TAG });
        self.frame.set(at + 16, host);
        self.frame.set(at + 24, gfn);
        self.filled[half(page_la)].push(at);
    }

    /// Remembers where the code at `rip` is.
    pub fn set_jump(&mut self, rip: u64, code: u64) {
        let at = frame::JUMPS + 16 * frame::jump_set(rip) as i32;
        if self.frame.get(at) == rip && self.frame.get(at + 8) == code {
            return;
        }
        self.frame.set(at + 8, code);
        self.frame.set(at, rip);
        self.jumps[half(rip)].push(at);
    }

    /// Forgets all code.
    pub fn forget_jumps(&mut self) {
        self.forget_jumps_of(0);
        self.forget_jumps_of(1);
    }

    fn forget_jumps_of(&mut self, half: usize) {
        self.intact = false;
        for at in std::mem::take(&mut self.jumps[half]) {
            self.frame.set(at, frame::NO_TAG);
        }
    }

    fn forget_half(&mut self, which: usize) {
        for at in std::mem::take(&mut self.filled[which]) {
            // The slot may hold the other half's entry by now.
            let tag = self.frame.get(at);
            if tag == frame::NO_TAG || half(tag) == which {
                self.clear_entry(at);
            }
        }
        self.forget_jumps_of(which);
    }

    /// Whether no code was forgotten since the last time this was asked.
    pub fn jumps_intact(&mut self) -> bool {
        std::mem::replace(&mut self.intact, true)
    }

    /// Acts on an event of the interpreter's TLB.
    pub fn apply(&mut self, event: TlbEvent) {
        match event {
            TlbEvent::FlushLower => self.forget_half(0),
            TlbEvent::FlushAll => {
                self.forget_half(0);
                self.forget_half(1);
            }
            TlbEvent::Page(la) => {
                for user in [false, true] {
                    let at = Self::entry(la, user);
                    if self.frame.get(at) == la & !0xfff {
                        self.clear_entry(at);
                    }
                }
                self.forget_jumps_in(la & !0xfff);
            }
            TlbEvent::WriteProtect(gfn) => self.write_protect(gfn),
        }
    }

    /// Forgets code in the page at a linear address.
    pub fn forget_jumps_in(&mut self, page: u64) {
        let half = half(page);
        let frame = self.frame;
        let mut gone = false;
        self.jumps[half].retain(|&at| {
            let hit = frame.get(at) & !0xfff == page;
            if hit {
                frame.set(at, frame::NO_TAG);
                gone = true;
            }
            !hit
        });
        self.intact &= !gone;
    }

    fn write_protect(&mut self, gfn: u64) {
        for &at in self.filled.iter().flatten() {
            if self.frame.get(at + 24) == gfn {
                self.frame.set(at + 8, frame::NO_TAG);
            }
        }
    }
}

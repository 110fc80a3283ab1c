//! What one translation leaves to the next of its thread: empty lists with their memory, and what iced-x86 needs. Asking the allocator for all of it cost
//! a sixth of a translation.

use std::cell::Cell;

use iced_x86::{Encoder, InstructionInfoFactory};

use super::branch::PendingExit;
use super::memory::Miss;
use super::{Exit, Fragment, Place, Site, adapt, group, pair};
use crate::look::Look;

/// The lists of a translation, and those of the fragment that it makes. All of them are empty before.
pub(super) struct Room {
    /// See [`Fragment::code`], [`Fragment::exits`], [`Fragment::sites`], [`Fragment::map`] and [`Fragment::ranges`].
    pub code: Vec<u8>,
    pub exits: Vec<Exit>,
    pub sites: Vec<Site>,
    pub map: Vec<Place>,
    pub ranges: Vec<(u16, u16)>,
    /// None before the first translation.
    pub encoder: Option<Box<Encoder>>,
    pub info: InstructionInfoFactory,
    /// What was seen of each instruction.
    pub looks: Vec<Look>,
    /// Live flags before each instruction, and after the last.
    pub live: Vec<u32>,
    /// See [`super::Targets`].
    pub known: Vec<(u64, u32, usize)>,
    pub misses: Vec<Miss>,
    pub pending: Vec<PendingExit>,
    pub plan: group::Plan,
    /// What stands behind the straight line.
    pub seldom: Vec<pair::Seldom>,
    /// Misses of groups: they go on in code without groups.
    pub plain_exits: Vec<usize>,
    /// Second forms that are still to be made.
    pub halves: Vec<adapt::Pending>,
}

thread_local! {
    static ROOM: Cell<Option<Box<Room>>> = const { Cell::new(None) };
}

impl Room {
    fn new() -> Self {
        Self {
            code: Vec::new(),
            exits: Vec::new(),
            sites: Vec::new(),
            map: Vec::new(),
            ranges: Vec::new(),
            encoder: None,
            info: InstructionInfoFactory::new(),
            looks: Vec::new(),
            live: Vec::new(),
            known: Vec::new(),
            misses: Vec::new(),
            pending: Vec::new(),
            plan: group::Plan::default(),
            seldom: Vec::new(),
            plain_exits: Vec::new(),
            halves: Vec::new(),
        }
    }

    /// The thread's room, if nobody has it, else a new one.
    pub fn take() -> Box<Self> {
        ROOM.try_with(Cell::take).ok().flatten().unwrap_or_else(|| Box::new(Self::new()))
    }

    /// Empties the room for the next translation.
    pub fn leave(mut self: Box<Self>) {
        self.looks.clear();
        self.live.clear();
        self.known.clear();
        self.misses.clear();
        self.pending.clear();
        self.plan.clear();
        self.seldom.clear();
        self.plain_exits.clear();
        self.halves.clear();
        self.give_back();
    }

    fn give_back(self: Box<Self>) {
        // A thread that ends has no next translation.
        let _ended = ROOM.try_with(|room| room.set(Some(self)));
    }
}

/// Puts a list where another is to be made.
fn put<T>(place: &mut Vec<T>, list: &mut Vec<T>) {
    list.clear();
    std::mem::swap(place, list);
}

impl Drop for Fragment {
    /// Leaves its lists to the next one.
    fn drop(&mut self) {
        let Ok(Some(mut room)) = ROOM.try_with(Cell::take) else { return };
        put(&mut room.code, &mut self.code);
        put(&mut room.exits, &mut self.exits);
        put(&mut room.sites, &mut self.sites);
        put(&mut room.map, &mut self.map);
        put(&mut room.ranges, &mut self.ranges);
        room.give_back();
    }
}

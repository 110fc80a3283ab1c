//! The translation cache: code memory, the index of fragments, links.
//!
//! A fragment is known by the frame that its guest code lies in, the offset there, and what it was translated for; never by an address space.
//! Fragments of a page are linked to each other directly; nothing outside holds a pointer that is not checked by guest address, or that
//! does not reach the fragment by its entries. So a fragment is taken out by patching its entries to the code that leaves (INV-TC-1):
//! whoever comes, by a link or by a table, finds the way out, and the engine finds what to do:
//!
//! - *suspended*: code was written in lines that it depends on. Its bytes are compared when it is wanted, and if they are the same it goes on.
//! - *on probation* (`segments`): if it is wanted, it moves, and the entries that it leaves behind lead to the new ones.
//! - *dropped*: its bytes changed. Another takes its place, and the links that led to it.
//!
//! Memory is bounded by code memory: when a segment is emptied its fragments' numbers, sites, exits and places in every index are free for others.
//! Links that lead there are undone (every fragment has the list of links that lead to it, INV-TC-2), and the engine wipes the jump tables'
//! entries before any code is put there (INV-TC-3, [`Cache::take_emptied`]).

#![expect(clippy::cast_possible_truncation, reason = "numbers are bounded by the size of code memory")]

mod index;
mod segments;

use std::hash::BuildHasher as _;

use bt::{Facts, Fragment, Site, Variant};
use guestmem::Gfn;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use crate::code_memory::CodeMemory;
use crate::content::{Check, Source};
use index::Index;
use segments::Segments;

/// What a fragment is known by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// The frame of the first byte.
    pub gfn: Gfn,
    /// Offset of the first byte in the frame.
    pub offset: u16,
    /// What it may rely on.
    pub env: u8,
    /// Rights.
    pub variant: Variant,
    /// RIP of the page's first byte if the code contains it, else 0.
    pub page_rip: u64,
    /// Without groups (`bt::Facts::plain`).
    pub plain: bool,
    /// The frame of the next page, if the first instruction reaches into it, else [`NO_FRAME`].
    pub second: Gfn,
}

fn hash(key: &Key) -> u64 {
    FxBuildHasher.hash_one(key)
}

/// No frame has this number.
pub const NO_FRAME: Gfn = Gfn(u64::MAX);
/// No fragment or link has this number: that of what has no site (`bt`).
const NONE: u32 = u32::MAX;
/// Sites and exits are numbered by fragment: so many bits are for the number within it.
const WITHIN: u32 = 10;
/// Fragments at most.
const MAX_FRAGMENTS: usize = (NONE >> WITHIN) as usize;

/// What may be done with a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It runs.
    Live,
    /// Its code may have changed.
    Suspended,
    /// Its code changed: it is only a way out, or to what took its place.
    Dropped,
}

/// A fragment in code memory.
struct Entry {
    key: Key,
    /// So many were made before it.
    made: u64,
    at: u32,
    len: u16,
    /// From `at`.
    inner: u16,
    stale_inner: u16,
    stale_outer: u16,
    state: State,
    /// The bytes that patches have replaced at the inner and the outer entry.
    replaced: Option<[[u8; 5]; 2]>,
    source: Source,
    sites: Box<[Site]>,
    links: Box<[Link]>,
    /// The first link that leads here.
    incoming: u32,
}

impl Entry {
    /// Offset of the inner entry in code memory.
    const fn inner(&self) -> usize {
        self.at as usize + self.inner as usize
    }

    /// Whether the outer entry is another.
    const fn has_outer(&self) -> bool {
        self.key.page_rip == 0
    }
}

/// The fragments made from one frame of guest memory.
struct PageCode {
    /// The frame's version when the first of them was made.
    version: u32,
    /// With the lines that they depend on.
    fragments: Vec<(u32, u64)>,
}

/// A way out of a fragment.
#[derive(Clone, Copy)]
struct Link {
    /// Where the displacement of its jump lies, or 0 if it is none.
    place: u32,
    /// The code that leaves, where the jump leads while it is not linked.
    stub: u32,
    target: i32,
    variant: Variant,
    plain: bool,
    /// It is linked to another page, and stands in [`Cache::between_pages`].
    between: bool,
    /// The fragment that it is linked to.
    to: u32,
    /// Its neighbours in the list of links that lead there.
    next: u32,
    previous: u32,
}

/// A site, with the fragment that it belongs to.
#[derive(Clone, Copy)]
pub struct PlacedSite {
    /// The site.
    pub site: Site,
    /// RIP of the page's first byte, if the fragment knows it.
    pub page_rip: u64,
    /// Host address of [`Site::done`], or 0.
    pub done: u64,
    /// The frame of the fragment's first byte, its number, and how many were made before it.
    pub gfn: Gfn,
    /// See [`PlacedSite::gfn`].
    pub fragment: u32,
    /// See [`PlacedSite::gfn`].
    pub made: u64,
}

/// What eviction did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Evictions {
    /// Segments emptied.
    pub segments: u64,
    /// Fragments that were forgotten because nobody had entered them for long.
    pub fragments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Fragments on probation that were entered, and moved.
    pub moved: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Bytes of dropped fragments, whose place others take.
    pub dropped_bytes: u64,
}

/// The translation cache of a vCPU.
pub struct Cache {
    code: CodeMemory,
    segments: Segments,
    /// Fragments that can be found, by the hash of their keys: a million keys would be as large as their code.
    index: Index,
    entries: Vec<Option<Entry>>,
    /// Of fragments that check themselves.
    checks: FxHashMap<u32, Check>,
    free: Vec<u32>,
    pages: FxHashMap<Gfn, PageCode>,
    /// Links that lead to another page; some of them not any more.
    between_pages: Vec<u32>,
    /// How many there may be before those are sorted out.
    between_limit: usize,
    emptied: Vec<std::ops::Range<u64>>,
    epoch: u64,
    made: u64,
    /// What eviction did.
    pub evictions: Evictions,
}

/// Where an exit leads.
#[derive(Clone, Copy)]
pub struct Target {
    /// What the fragment that it belongs to is known by.
    pub from: Key,
    /// From the first byte of its page.
    pub offset: i32,
    /// Rights there.
    pub variant: Variant,
    /// To code without groups.
    pub plain: bool,
}

/// Guest code that is to be inserted.
pub struct New<'a> {
    /// What it is known by.
    pub key: Key,
    /// The translation.
    pub fragment: &'a Fragment,
    /// The bytes that it was made of.
    pub source: Source,
    /// If it checks itself, and so is not traced.
    pub check: Option<Check>,
    /// The version of the page that it was made from.
    pub version: u32,
    /// And of the second, if it reaches there.
    pub second_version: u32,
}

/// Fragments for which there is room at a time.
const ENTRIES_STEP: usize = 4096;
/// Links between pages that are remembered before it is looked which of them still are.
const BETWEEN_PAGES: usize = 4096;

impl Cache {
    /// An empty cache with so many bytes of code memory.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn new(code_bytes: usize) -> rustix::io::Result<Self> {
        Ok(Self {
            code: CodeMemory::new(code_bytes)?,
            segments: Segments::new(code_bytes),
            index: Index::new()?,
            entries: Vec::new(),
            checks: FxHashMap::default(),
            free: Vec::new(),
            pages: FxHashMap::default(),
            between_pages: Vec::new(),
            between_limit: BETWEEN_PAGES,
            emptied: Vec::new(),
            epoch: 0,
            made: 0,
            evictions: Evictions::default(),
        })
    }

    /// Bytes of code memory in use.
    pub fn code_bytes(&self) -> usize {
        self.segments.used()
    }

    /// Host addresses of code memory.
    pub fn code_range(&self) -> std::ops::Range<u64> {
        self.code.address(0)..self.code.address(usize::MAX)
    }

    /// Bytes of what is kept beside the code: entries, sites, links, and about as much as the index takes.
    pub fn table_bytes(&self) -> usize {
        let of = |count: usize, size: usize| count * size;
        let entries = self.entries.iter().flatten();
        let boxes: usize = entries
            .map(|e| of(e.sites.len(), size_of::<Site>()) + of(e.links.len(), size_of::<Link>()))
            .sum();
        let lists: usize =
            self.pages.values().map(|p| of(p.fragments.capacity(), size_of::<(u32, u64)>())).sum();
        boxes
            + lists
            + of(self.entries.capacity(), size_of::<Option<Entry>>())
            + self.index.bytes()
            + of(self.pages.capacity(), size_of::<(Gfn, PageCode)>() + 1)
            + of(self.between_pages.capacity(), size_of::<u32>())
            + of(self.checks.capacity(), size_of::<(u32, Check)>() + 1)
    }

    /// The number that the next fragment gets.
    pub fn next_number(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.entries.len() as u32)
    }

    /// How many fragments were ever made.
    pub const fn made(&self) -> u64 {
        self.made
    }

    /// Numbers for the next fragment's sites and exits.
    pub fn bases(&self) -> (u32, u32) {
        let base = self.next_number() << WITHIN;
        (base, base)
    }

    fn entry(&self, number: u32) -> Option<&Entry> {
        self.entries.get(number as usize)?.as_ref()
    }

    fn entry_mut(&mut self, number: u32) -> Option<&mut Entry> {
        self.entries.get_mut(number as usize)?.as_mut()
    }

    fn link_of(&self, link: u32) -> Option<&Link> {
        self.entry(link >> WITHIN)?.links.get(link as usize & ((1 << WITHIN) - 1))
    }

    fn link_mut(&mut self, link: u32) -> Option<&mut Link> {
        self.entry_mut(link >> WITHIN)?.links.get_mut(link as usize & ((1 << WITHIN) - 1))
    }

    /// A site by its number.
    pub fn site(&self, number: u32) -> Option<PlacedSite> {
        let fragment = number >> WITHIN;
        let e = self.entry(fragment)?;
        let &site = e.sites.get(number as usize & ((1 << WITHIN) - 1))?;
        let done = if site.done == 0 { 0 } else { self.code.address(e.at as usize + usize::from(site.done)) };
        let (gfn, made) = (e.key.gfn, e.made);
        Some(PlacedSite { site, page_rip: e.key.page_rip, done, gfn, fragment, made })
    }

    /// The fragment's number, if there is one. It may be suspended or on probation.
    #[inline(always)]
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.index.find(hash(key), |number| self.entry(number).is_some_and(|e| e.key == *key))
    }

    /// Whether a fragment can be entered as it is.
    pub fn is_ready(&self, fragment: u32) -> bool {
        self.entry(fragment).is_some_and(|e| e.replaced.is_none())
    }

    /// What may be done with a fragment.
    pub fn state(&self, fragment: u32) -> State {
        self.entry(fragment).map_or(State::Dropped, |e| e.state)
    }

    /// The bytes that a fragment was made of, and where.
    pub fn source(&self, fragment: u32) -> Option<(Key, Source)> {
        self.entry(fragment).map(|e| (e.key, e.source))
    }

    /// What is known of a fragment if it checks itself.
    pub fn check_mut(&mut self, fragment: u32) -> Option<&mut Check> {
        self.checks.get_mut(&fragment)
    }

    /// Host address of a fragment's outer entry.
    pub fn address(&self, fragment: u32) -> u64 {
        self.entry(fragment).map_or(0, |e| self.code.address(e.at as usize))
    }

    /// The code of a fragment.
    pub fn code_of(&self, fragment: u32) -> &[u8] {
        self.entry(fragment).map_or(&[], |e| self.code.get(e.at as usize, usize::from(e.len)))
    }

    /// What a fragment is known by.
    pub fn key(&self, fragment: u32) -> Option<Key> {
        self.entry(fragment).map(|e| e.key)
    }

    /// Whether it is level 3's.
    pub fn is_user(&self, fragment: u32) -> bool {
        self.entry(fragment).is_some_and(|e| e.key.variant == Variant::User)
    }

    /// Changes with each fragment that is forgotten: numbers from before may stand for others.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Adds a fragment, for which older ones may be forgotten; its number, or None if it is too large.
    pub fn insert(&mut self, new: &New<'_>) -> Option<u32> {
        let f = new.fragment;
        let few = f.sites.len().max(f.exits.len()) < 1 << WITHIN && f.code.len() <= usize::from(u16::MAX);
        if !few || !self.segments.fits(f.code.len()) || self.next_number() as usize >= MAX_FRAGMENTS {
            return None;
        }
        if let Some(old) = self.find(&new.key) {
            self.discard(old);
        }
        let number = self.next_number();
        let at = match self.segments.room(f.code.len(), number) {
            Some(at) => at,
            None => {
                self.advance();
                // The fragment's sites and exits have this number.
                self.reserve(number);
                self.segments.room(f.code.len(), number)?
            }
        };
        self.code.fill_from(at);
        self.code.put(at, &f.code);
        let at = at as u32;
        let link = |e: &bt::Exit| Link {
            place: e.place.map_or(0, |place| at + place),
            stub: at + e.stub,
            target: e.target,
            variant: e.variant,
            plain: e.plain,
            between: false,
            to: NONE,
            next: NONE,
            previous: NONE,
        };
        let entry = Entry {
            key: new.key,
            made: self.made,
            at,
            len: f.code.len() as u16,
            inner: f.inner as u16,
            stale_inner: f.stale_inner as u16,
            stale_outer: f.stale_outer as u16,
            state: State::Live,
            replaced: None,
            source: new.source,
            sites: f.sites.as_slice().into(),
            links: f.exits.iter().map(link).collect(),
            incoming: NONE,
        };
        self.made += 1;
        self.place(number, entry);
        if let Some(check) = new.check {
            self.checks.insert(number, check);
        }
        let lines = if new.check.is_some() { 0 } else { new.source.lines() };
        let second = (new.key.second != NO_FRAME).then_some((new.key.second, new.second_version, 1));
        for (gfn, version, lines) in [(new.key.gfn, new.version, lines)].into_iter().chain(second) {
            let page = self.pages.entry(gfn).or_insert_with(|| PageCode { version, fragments: Vec::new() });
            page.fragments.push((number, lines));
        }
        Some(number)
    }

    /// Makes [`Cache::next_number`] what it was before others were forgotten.
    fn reserve(&mut self, number: u32) {
        if let Some(at) = self.free.iter().position(|n| *n == number) {
            let last = self.free.len() - 1;
            self.free.swap(at, last);
        }
    }

    fn place(&mut self, number: u32, entry: Entry) {
        let key = entry.key;
        if self.free.last() == Some(&number) {
            self.free.pop();
        }
        if self.entries.len() <= number as usize {
            if self.entries.capacity() <= number as usize {
                // Not twice as much.
                self.entries.reserve_exact(ENTRIES_STEP);
            }
            self.entries.resize_with(number as usize + 1, || None);
        }
        if let Some(slot) = self.entries.get_mut(number as usize) {
            *slot = Some(entry);
        }
        self.index.insert(hash(&key), number);
    }

    /// What an exit leads to.
    pub fn target(&self, link: u32) -> Option<Target> {
        let from = self.entry(link >> WITHIN)?.key;
        let link = self.link_of(link)?;
        Some(Target { from, offset: link.target, variant: link.variant, plain: link.plain })
    }

    /// Whether an exit can be linked at all.
    pub fn may_link(&self, link: u32) -> bool {
        self.link_of(link).is_some_and(|l| l.place != 0)
    }

    /// The fragment whose own entries led to this exit, if it runs: its check of its bytes failed, or it is time to look at them.
    pub fn checked_by(&self, link: u32) -> Option<u32> {
        let e = self.entry(link >> WITHIN)?;
        let l = self.link_of(link)?;
        let own = l.stub == e.at + u32::from(e.stale_inner) && e.state == State::Live && e.replaced.is_none();
        (own && self.checks.contains_key(&(link >> WITHIN))).then_some(link >> WITHIN)
    }

    /// Links an exit to a fragment, if it can be. Exits to another page are linked until [`Cache::unlink_pages`].
    pub fn link(&mut self, link: u32, fragment: u32, other_page: bool) -> bool {
        let Some(inner) = self.entry(fragment).map(Entry::inner) else { return false };
        let Some(place) = self.link_of(link).map(|l| l.place).filter(|place| *place != 0) else {
            return false;
        };
        self.detach(link);
        self.code.link(place as usize, inner);
        self.attach(link, fragment);
        if other_page {
            self.note_between(link);
        }
        true
    }

    fn note_between(&mut self, link: u32) {
        match self.link_mut(link) {
            Some(l) if !l.between => l.between = true,
            _ => return,
        }
        if self.between_pages.len() >= self.between_limit {
            let mut all = std::mem::take(&mut self.between_pages);
            all.sort_unstable();
            all.dedup();
            all.retain(|l| self.link_of(*l).is_some_and(|l| l.between));
            self.between_limit = BETWEEN_PAGES.max(2 * all.len());
            self.between_pages = all;
        }
        self.between_pages.push(link);
    }

    /// Puts a link in the list of those that lead to a fragment (INV-TC-2).
    fn attach(&mut self, link: u32, to: u32) {
        let Some(target) = self.entry_mut(to) else { return };
        let first = std::mem::replace(&mut target.incoming, link);
        if let Some(l) = self.link_mut(link) {
            (l.to, l.next, l.previous) = (to, first, NONE);
        }
        if let Some(l) = self.link_mut(first) {
            l.previous = link;
        }
    }

    /// Takes a link out of the list that it is in.
    fn detach(&mut self, link: u32) {
        let Some(l) = self.link_mut(link) else { return };
        let (to, next, previous) = (l.to, l.next, l.previous);
        (l.to, l.next, l.previous) = (NONE, NONE, NONE);
        if to == NONE {
            return;
        }
        if let Some(n) = self.link_mut(next) {
            n.previous = previous;
        }
        if let Some(p) = self.link_mut(previous) {
            p.next = next;
        } else if let Some(e) = self.entry_mut(to) {
            e.incoming = next;
        }
    }

    fn unlink(&mut self, link: u32) {
        if let Some(l) = self.link_of(link).filter(|l| l.to != NONE).copied() {
            self.code.link(l.place as usize, l.stub as usize);
        }
        self.detach(link);
    }

    /// If the exit is that of a dropped fragment's entries, and `fragment` has taken its place: the links that led there lead to the new one. (What
    /// comes by a jump table comes once, for the engine enters the new one there.)
    pub fn forward(&mut self, link: u32, fragment: u32) {
        let from = link >> WITHIN;
        let (Some(old), Some(new)) = (self.entry(from), self.entry(fragment)) else { return };
        if from == fragment || old.state != State::Dropped || self.may_link(link) || old.key != new.key {
            return;
        }
        let inner = new.inner();
        while let Some(first) = self.entry(from).map(|e| e.incoming).filter(|l| *l != NONE) {
            let place = self.link_of(first).map_or(0, |l| l.place);
            self.detach(first);
            self.code.link(place as usize, inner);
            self.attach(first, fragment);
        }
    }

    /// Undoes the links between pages: the mapping of some code has changed.
    pub fn unlink_pages(&mut self) {
        self.between_limit = BETWEEN_PAGES;
        for link in std::mem::take(&mut self.between_pages) {
            if let Some(l) = self.link_mut(link).filter(|l| l.between) {
                l.between = false;
                self.unlink(link);
            }
        }
    }

    /// Undoes the links from other pages to code in the page at a linear address, or to an instruction that reaches into it.
    pub fn unlink_page(&mut self, page: u64) {
        let leads_there = |e: &Entry| match e.key.page_rip {
            own if own == page => true,
            own => own == page.wrapping_sub(0x1000) && e.key.second != NO_FRAME,
        };
        // They stay in the list, as those do that were detached.
        for n in 0..self.between_pages.len() {
            let Some(&link) = self.between_pages.get(n) else { break };
            let to = self.link_of(link).filter(|l| l.between).and_then(|l| self.entry(l.to));
            if to.is_some_and(leads_there) {
                self.unlink(link);
            }
        }
    }

    /// Makes a fragment's entries lead out of the cache.
    fn close(&mut self, fragment: u32) {
        let Some(e) = self.entry(fragment).filter(|e| e.replaced.is_none()) else { return };
        let (inner, at, outer) = (e.inner(), e.at as usize, e.has_outer());
        let (stale_inner, stale_outer) = (at + usize::from(e.stale_inner), at + usize::from(e.stale_outer));
        let mut replaced = [[0; 5]; 2];
        for (bytes, at) in replaced.iter_mut().zip([inner, at]) {
            if let Ok(now) = <[u8; 5]>::try_from(self.code.get(at, 5)) {
                *bytes = now;
            }
        }
        self.code.redirect(inner, stale_inner);
        if outer {
            self.code.redirect(at, stale_outer);
        }
        if let Some(e) = self.entry_mut(fragment) {
            e.replaced = Some(replaced);
        }
    }

    /// Suspends the fragments that depend on `lines` of a frame; how many.
    pub fn suspend(&mut self, gfn: Gfn, lines: u64) -> usize {
        let Some(page) = self.pages.get(&gfn) else { return 0 };
        let hit: Vec<u32> = page.fragments.iter().filter(|f| f.1 & lines != 0).map(|f| f.0).collect();
        let mut count = 0;
        for fragment in hit {
            if let Some(e) = self.entry_mut(fragment).filter(|e| e.state == State::Live) {
                e.state = State::Suspended;
                count += 1;
                self.close(fragment);
            }
        }
        count
    }

    /// Suspends the fragments of every frame with another version than `version` says it had when they were made.
    pub fn suspend_changed(&mut self, version: impl Fn(Gfn) -> u32) -> usize {
        let changed: Vec<Gfn> =
            self.pages.iter().filter(|(gfn, p)| version(**gfn) != p.version).map(|(gfn, _)| *gfn).collect();
        changed.into_iter().map(|gfn| self.suspend(gfn, u64::MAX)).sum()
    }

    /// A fragment is wanted, and its bytes are what it was made of: it can be entered again. False: there is no room to move it to.
    pub fn resume(&mut self, fragment: u32) -> bool {
        let Some(e) = self.entry_mut(fragment).filter(|e| e.state != State::Dropped) else { return false };
        e.state = State::Live;
        let at = e.at as usize;
        if self.segments.is_on_probation(at) {
            return self.relocate(fragment);
        }
        self.open(fragment);
        true
    }

    /// Undoes [`Cache::close`].
    fn open(&mut self, fragment: u32) {
        let Some(e) = self.entry_mut(fragment) else { return };
        let (inner, at) = (e.inner(), e.at as usize);
        if let Some([inner_bytes, outer_bytes]) = e.replaced.take() {
            self.code.put(inner, &inner_bytes);
            self.code.put(at, &outer_bytes);
        }
    }

    /// Moves a fragment to the segment that is being filled. What leads to it by a link leads there; its old entries too.
    fn relocate(&mut self, fragment: u32) -> bool {
        let Some((old, len)) = self.entry(fragment).map(|e| (e.at as usize, usize::from(e.len))) else {
            return false;
        };
        let Some(at) = self.segments.room(len, fragment) else { return false };
        self.open(fragment);
        let code = self.code.get(old, len).to_vec();
        self.code.put(at, &code);
        let Some(e) = self.entry_mut(fragment) else { return false };
        let moved = |place: u32| (place as usize - old + at) as u32;
        let (old_inner, outer) = (e.inner(), e.has_outer());
        e.at = at as u32;
        for l in &mut e.links {
            l.place = if l.place == 0 { 0 } else { moved(l.place) };
            l.stub = moved(l.stub);
        }
        let (inner, incoming) = (e.inner(), e.incoming);
        let outgoing: Vec<(u32, u32)> =
            e.links.iter().filter(|l| l.to != NONE).map(|l| (l.place, l.to)).collect();
        for (place, to) in outgoing {
            let target = self.entry(to).map_or(0, Entry::inner);
            self.code.link(place as usize, target);
        }
        let mut next = incoming;
        while let Some(l) = self.link_of(next).copied() {
            self.code.link(l.place as usize, inner);
            next = l.next;
        }
        self.code.redirect(old_inner, inner);
        if outer {
            self.code.redirect(old, at);
        }
        self.evictions.moved += 1;
        self.evictions.moved_bytes += len as u64;
        true
    }

    /// The code of a fragment has changed, or it cannot stay: nobody finds it any more.
    pub fn discard(&mut self, fragment: u32) {
        self.close(fragment);
        let Some(e) = self.entry_mut(fragment).filter(|e| e.state != State::Dropped) else { return };
        e.state = State::Dropped;
        e.sites = Box::default();
        let (key, at, len) = (e.key, e.at as usize, usize::from(e.len));
        self.checks.remove(&fragment);
        self.segments.note_dead(at, len);
        self.evictions.dropped_bytes += len as u64;
        self.forget_key(&key, fragment);
        for gfn in [key.gfn, key.second] {
            if let Some(page) = self.pages.get_mut(&gfn) {
                page.fragments.retain(|f| f.0 != fragment);
                if page.fragments.is_empty() {
                    self.pages.remove(&gfn);
                }
            }
        }
    }

    /// Discards every fragment of a frame.
    pub fn drop_frame(&mut self, gfn: Gfn) {
        let all: Vec<u32> =
            self.pages.get(&gfn).into_iter().flat_map(|p| p.fragments.iter().map(|f| f.0)).collect();
        all.into_iter().for_each(|fragment| self.discard(fragment));
    }

    fn forget_key(&mut self, key: &Key, fragment: u32) {
        self.index.remove(hash(key), fragment);
    }

    /// Fills the next segment from now on, and forgets what is still there.
    pub fn advance(&mut self) {
        let (next, fragments) = self.segments.take_next();
        let range = self.segments.range(next);
        let mut frames = FxHashSet::default();
        if !fragments.is_empty() {
            self.emptied.push(self.code.address(range.start)..self.code.address(range.end));
            self.evictions.segments += 1;
        }
        for fragment in fragments {
            if self.entry(fragment).is_some_and(|e| range.contains(&(e.at as usize))) {
                self.evict(fragment, &mut frames);
            }
        }
        for gfn in frames {
            let Some(page) = self.pages.get_mut(&gfn) else { continue };
            let entries = &self.entries;
            page.fragments.retain(|f| entries.get(f.0 as usize).is_some_and(Option::is_some));
            if page.fragments.is_empty() {
                self.pages.remove(&gfn);
            }
        }
        self.epoch += 1;
        for fragment in self.segments.advance(next).to_vec() {
            let there = |e: &&Entry| self.segments.is_on_probation(e.at as usize) && e.state == State::Live;
            if self.entry(fragment).filter(there).is_some() {
                self.close(fragment);
            }
        }
    }

    /// Forgets a fragment; `frames` gets those whose lists it must be taken from.
    fn evict(&mut self, fragment: u32, frames: &mut FxHashSet<Gfn>) {
        while let Some(link) = self.entry(fragment).map(|e| e.incoming).filter(|l| *l != NONE) {
            self.unlink(link);
        }
        let count = self.entry(fragment).map_or(0, |e| e.links.len() as u32);
        for link in 0..count {
            self.detach(fragment << WITHIN | link);
        }
        let Some(e) = self.entries.get_mut(fragment as usize).and_then(Option::take) else { return };
        if e.state != State::Dropped {
            self.evictions.fragments += 1;
            self.evictions.bytes += u64::from(e.len);
            self.forget_key(&e.key, fragment);
            frames.insert(e.key.gfn);
            frames.insert(e.key.second);
        }
        self.checks.remove(&fragment);
        self.free.push(fragment);
    }

    /// Host addresses that nothing may lead to any more: what is not linked is for the caller to forget (INV-TC-3).
    pub fn take_emptied(&mut self) -> Vec<std::ops::Range<u64>> {
        std::mem::take(&mut self.emptied)
    }

    /// Forgets everything. No code of it runs.
    pub fn clear(&mut self) {
        self.index.clear();
        self.entries.clear();
        self.checks.clear();
        self.free.clear();
        self.pages.clear();
        self.between_pages.clear();
        self.segments.clear();
        self.emptied.clear();
        self.epoch += 1;
    }

    /// How many fragments the memory holds, dropped ones included.
    pub const fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

/// What translations rely on besides the page, as a small number: equal facts have equal numbers.
#[derive(Default)]
pub struct Environments(Vec<Facts>);

impl Environments {
    /// The number of these facts (the page and the variant set aside). None: there are too many, forget all fragments.
    pub fn number(&mut self, facts: Facts) -> Option<u8> {
        let facts = Facts { page_rip: None, variant: Variant::Supervisor, ..facts };
        if let Some(n) = self.0.iter().position(|f| *f == facts) {
            return u8::try_from(n).ok();
        }
        self.0.push(facts);
        u8::try_from(self.0.len() - 1).ok()
    }
}

//! The translation cache: code memory, the index of fragments, links.
//!
//! A fragment is known by the frame that its guest code lies in, the offset there, and what it was translated for; never by an address space.
//! Fragments of a page are linked to each other directly; nothing outside holds a pointer that is not checked by guest address, or that
//! does not reach the fragment by its entries. So a page's fragments are dropped by patching their entries to the code that leaves (INV-TC-1):
//! whoever comes, by a link or by a table, finds the way out.

#![expect(clippy::cast_possible_truncation, reason = "numbers are bounded by the size of code memory")]

use bt::{Facts, Fragment, Site, Variant};
use guestmem::Gfn;
use rustc_hash::FxHashMap;

use crate::code_memory::CodeMemory;

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

/// No frame has this number.
pub const NO_FRAME: Gfn = Gfn(u64::MAX);

/// A fragment in code memory.
#[derive(Clone, Copy)]
struct Entry {
    key: Key,
    at: u32,
    inner: u32,
    stale_inner: u32,
    stale_outer: u32,
}

/// The fragments made from one frame of guest memory.
#[derive(Default)]
struct PageCode {
    version: u32,
    fragments: Vec<u32>,
}

/// A way out of a fragment.
#[derive(Clone, Copy)]
struct Link {
    /// Where the displacement of its jump lies, or 0 if it is none.
    place: u32,
    /// The code that leaves, where the jump leads while it is not linked.
    stub: u32,
    from: u32,
    target: i32,
    variant: Variant,
    plain: bool,
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
}

/// The translation cache of a vCPU.
pub struct Cache {
    code: CodeMemory,
    index: FxHashMap<Key, u32>,
    entries: Vec<Entry>,
    pages: FxHashMap<Gfn, PageCode>,
    /// With the number of the fragment.
    sites: Vec<(Site, u32)>,
    links: Vec<Link>,
    /// Links that lead to another page.
    between_pages: Vec<u32>,
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
    /// The version of the page that it was made from.
    pub version: u32,
    /// And of the second, if it reaches there.
    pub second_version: u32,
}

impl Cache {
    /// An empty cache with so many bytes of code memory.
    ///
    /// # Errors
    /// When the host gives no memory for code.
    pub fn new(code_bytes: usize) -> rustix::io::Result<Self> {
        Ok(Self {
            code: CodeMemory::new(code_bytes)?,
            index: FxHashMap::default(),
            entries: Vec::new(),
            pages: FxHashMap::default(),
            sites: Vec::new(),
            links: Vec::new(),
            between_pages: Vec::new(),
        })
    }

    /// Bytes of code memory in use.
    pub const fn code_bytes(&self) -> usize {
        self.code.used()
    }

    /// Host addresses of code memory.
    pub fn code_range(&self) -> std::ops::Range<u64> {
        self.code.address(0)..self.code.address(usize::MAX)
    }

    /// Bytes of what is kept beside the code: entries, sites, links, and about as much as the index takes.
    pub fn table_bytes(&self) -> usize {
        let of = |count: usize, size: usize| count * size;
        of(self.entries.capacity(), size_of::<Entry>())
            + of(self.index.capacity(), size_of::<(Key, u32)>() + 1)
            + of(self.pages.capacity(), size_of::<(Gfn, PageCode)>() + 1)
            + of(self.sites.capacity(), size_of::<(Site, u32)>())
            + of(self.links.capacity(), size_of::<Link>() + size_of::<u32>())
    }

    /// Numbers for the next fragment's sites and exits.
    pub fn bases(&self) -> (u32, u32) {
        (self.sites.len() as u32, self.links.len() as u32)
    }

    /// A site by its number.
    pub fn site(&self, number: u32) -> Option<PlacedSite> {
        let &(site, fragment) = self.sites.get(number as usize)?;
        let e = self.entries.get(fragment as usize)?;
        let done = if site.done == 0 { 0 } else { self.code.address((e.at + site.done) as usize) };
        Some(PlacedSite { site, page_rip: e.key.page_rip, done })
    }

    /// The fragment's number, if there is one.
    #[inline(always)]
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.index.get(key).copied()
    }

    /// Host address of a fragment's outer entry.
    pub fn address(&self, fragment: u32) -> u64 {
        self.entries.get(fragment as usize).map_or(0, |e| self.code.address(e.at as usize))
    }

    /// What a fragment is known by.
    pub fn key(&self, fragment: u32) -> Option<Key> {
        self.entries.get(fragment as usize).map(|e| e.key)
    }

    /// Adds a fragment; its number, or None if code memory is full.
    pub fn insert(&mut self, new: &New<'_>) -> Option<u32> {
        let f = new.fragment;
        let at = self.code.add(&f.code)? as u32;
        let number = self.entries.len() as u32;
        self.entries.push(Entry {
            key: new.key,
            at,
            inner: at + f.inner as u32,
            stale_inner: at + f.stale_inner as u32,
            stale_outer: at + f.stale_outer as u32,
        });
        self.sites.extend(f.sites.iter().map(|s| (*s, number)));
        self.links.extend(f.exits.iter().map(|e| Link {
            place: e.place.map_or(0, |place| at + place),
            stub: at + e.stub,
            from: number,
            target: e.target,
            variant: e.variant,
            plain: e.plain,
        }));
        self.index.insert(new.key, number);
        let second = (new.key.second != NO_FRAME).then_some((new.key.second, new.second_version));
        for (gfn, version) in [(new.key.gfn, new.version)].into_iter().chain(second) {
            let page = self.pages.entry(gfn).or_default();
            page.version = version;
            page.fragments.push(number);
        }
        Some(number)
    }

    /// What an exit leads to.
    pub fn target(&self, link: u32) -> Option<Target> {
        let link = self.links.get(link as usize)?;
        let from = self.entries.get(link.from as usize)?.key;
        Some(Target { from, offset: link.target, variant: link.variant, plain: link.plain })
    }

    /// Whether an exit can be linked at all.
    pub fn may_link(&self, link: u32) -> bool {
        self.links.get(link as usize).is_some_and(|l| l.place != 0)
    }

    /// Links an exit to a fragment, if it can be. Exits to another page are linked until [`Cache::unlink_pages`].
    pub fn link(&mut self, link: u32, fragment: u32, other_page: bool) -> bool {
        match (self.links.get(link as usize), self.entries.get(fragment as usize)) {
            (Some(l), Some(e)) if l.place != 0 => {
                self.code.link(l.place as usize, e.inner as usize);
                if other_page {
                    self.between_pages.push(link);
                }
                true
            }
            _ => false,
        }
    }

    /// If the exit is that of a dropped fragment's entries, and `fragment` has taken its place: the old entries lead there directly, so that jumps
    /// linked to them need no engine.
    pub fn forward(&mut self, link: u32, fragment: u32) {
        let Some(l) = self.links.get(link as usize).filter(|l| l.place == 0 && l.from != fragment) else {
            return;
        };
        let pair = (self.entries.get(l.from as usize), self.entries.get(fragment as usize));
        if let (Some(old), Some(new)) = pair
            && old.key == new.key
        {
            self.code.redirect(old.inner as usize, new.inner as usize);
            if old.key.page_rip == 0 {
                self.code.redirect(old.at as usize, new.at as usize);
            }
        }
    }

    /// Undoes the links between pages: the mapping of some code has changed.
    pub fn unlink_pages(&mut self) {
        for link in std::mem::take(&mut self.between_pages) {
            if let Some(l) = self.links.get(link as usize) {
                self.code.link(l.place as usize, l.stub as usize);
            }
        }
    }

    /// Whether fragments of a frame exist that were made from another version of its code.
    pub fn is_stale(&self, gfn: Gfn, version: u32) -> bool {
        self.pages.get(&gfn).is_some_and(|p| p.version != version)
    }

    /// Frames with fragments.
    pub fn frames(&self) -> Vec<Gfn> {
        self.pages.keys().copied().collect()
    }

    /// Forgets the fragments of a frame. True if there were any.
    pub fn drop_frame(&mut self, gfn: Gfn) -> bool {
        let Some(page) = self.pages.remove(&gfn) else { return false };
        for number in page.fragments {
            let Some(&e) = self.entries.get(number as usize) else { continue };
            if self.index.get(&e.key) == Some(&number) {
                self.index.remove(&e.key);
            }
            self.code.redirect(e.inner as usize, e.stale_inner as usize);
            if e.key.page_rip == 0 {
                self.code.redirect(e.at as usize, e.stale_outer as usize);
            }
        }
        true
    }

    /// Forgets everything. No code of it runs.
    pub fn clear(&mut self) {
        self.index.clear();
        self.entries.clear();
        self.pages.clear();
        self.sites.clear();
        self.links.clear();
        self.between_pages.clear();
        self.code.clear();
    }

    /// How many fragments the memory holds, dropped ones included.
    pub const fn len(&self) -> usize {
        self.entries.len()
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

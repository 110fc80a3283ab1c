//! Adaptation: instructions are innocent until their visits to the slow path prove them guilty.
//!
//! A [`Record`] is kept for an instruction (by frame and offset, so that all fragments that contain it share it) once a visit blames it for
//! something that another form would do better ([`bt::hints::Form`]). At [`Settings::threshold`] visits the hint is given: the fragment that came is
//! dropped, the next arrival translates anew with the hint, and the old entries forward there (`cache::Cache::forward`). Other fragments
//! with the instruction are made anew when they come, or get the hint when they are translated.
//!
//! Groups are another matter: one that fails now and then still pays. What fails without Rust comes as a sample, and only samples that follow
//! each other closely ([`HOT`]) count against a group.
//!
//! And back: a direct call looks now and then whether the innocent form would have worked; [`Settings::patience`] times in a row, and
//! the hint is taken back. A second form whose first did not fail for some rounds of [`Adaptation::tick`], and a group that was disbanded for as
//! long, are taken back too. Each return doubles the threshold for the next time (INV-ADAPT-2: so a site that changes its mind
//! for ever costs less and less).
//!
//! Fragments are dropped between runs of translated code only (INV-ADAPT-3): a visit notes them in [`Adaptation::pending`] and rings the alarm.
//! Memory: at most [`MAX_RECORDS`] records; the frame that came first is forgotten first. A frame whose code changes is forgotten.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bt::hints::{Form, Hints};
use bt::unit::Unit;
use guestmem::Gfn;
use rustc_hash::FxHashMap;

use crate::BtVcpu;
use crate::cache::PlacedSite;

/// The threshold that stands for [`Settings::forced`].
pub const ALL: u32 = u32::MAX;
/// Records at most.
pub const MAX_RECORDS: usize = 2048;
/// Groups that fail once in this time or oftener are worth disbanding: a failure costs as much as some ten checks more would.
const HOT: Duration = Duration::from_nanos(200);
/// Fragments that wait for being dropped, at most: others come again.
const MAX_PENDING: usize = 64;
/// A threshold is doubled so often at most.
const MAX_DOUBLINGS: u8 = 12;

/// What a visit to the slow path was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The access went to a device or to nothing.
    Device,
    /// It wrote to lines with translated code.
    Traced,
    /// It wrote to other lines of such a page, and could not pass.
    BesideCode,
    /// It crossed a page.
    Crossing,
    /// The check of a group failed: its range crossed a page, or was no plain memory.
    Group,
    /// The guest's tables do not allow it, or the address is none.
    Fault,
    /// It was not aligned as the instruction demands.
    Alignment,
    /// The inline check of a division failed.
    Division,
}

impl Cause {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Device,
        Self::Traced,
        Self::BesideCode,
        Self::Crossing,
        Self::Group,
        Self::Fault,
        Self::Alignment,
        Self::Division,
    ];

    /// Its name in the statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Traced => "code",
            Self::BesideCode => "beside code",
            Self::Crossing => "page crossing",
            Self::Group => "group",
            Self::Fault => "fault",
            Self::Alignment => "alignment",
            Self::Division => "division",
        }
    }

    /// The form that does better. None for what raises an exception nearly always: the instruction is executed again behind the guest's
    /// handler, and then its innocent form is the better one.
    const fn form(self) -> Option<Form> {
        match self {
            Self::Device | Self::Traced => Some(Form::Direct),
            Self::Crossing => Some(Form::Halves),
            Self::Group => Some(Form::Alone),
            // The second of these comes to Rust until the page is known as one that is shared.
            Self::Fault | Self::Alignment | Self::Division | Self::BesideCode => None,
        }
    }
}

/// When to adapt, and when to go back.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Guilty visits after which an instruction gets another form; 0: never.
    pub threshold: u32,
    /// One of so many failing groups, and of so many direct calls, is looked at.
    pub sample: u32,
    /// Samples in a row that must be innocent for a return.
    pub patience: u8,
    /// Rounds without a visit after which second forms and disbanded groups are taken back.
    pub rounds: u8,
    /// The dispatcher's turns in a round.
    pub round: u32,
    /// Instructions have other forms from the start, each another by its place, and keep them.
    pub forced: bool,
}

impl Settings {
    /// For a threshold. With 1, for tests, all is looked at and rounds are short.
    pub const fn new(threshold: u32) -> Self {
        const OFF: Settings = Settings {
            threshold: 0,
            sample: 1 << 30,
            patience: u8::MAX,
            rounds: u8::MAX,
            round: u32::MAX,
            forced: false,
        };
        match threshold {
            0 => OFF,
            1 => Self { threshold, sample: 1, patience: 2, rounds: 2, round: 16, ..OFF },
            ALL => Self { forced: true, ..OFF },
            _ => Self { threshold, sample: 16, patience: 8, rounds: 4, round: 4096, ..OFF },
        }
    }
}

/// What is known of one instruction and one form.
#[derive(Clone, Copy)]
struct Record {
    offset: u16,
    form: Form,
    cause: Cause,
    /// The hint is given.
    active: bool,
    /// Guilty visits of the innocent form since it last had it.
    count: u32,
    /// How often the hint was taken back.
    returns: u8,
    /// The first so many fragments were made without the hint.
    since: u64,
    /// Direct calls, for the sampling.
    visits: u32,
    /// Innocent samples, or rounds without a visit, in a row.
    innocent: u8,
    /// It was blamed since the last round.
    seen: bool,
}

impl Record {
    const fn new(offset: u16, form: Form, cause: Cause) -> Self {
        Self {
            offset,
            form,
            cause,
            active: false,
            count: 0,
            returns: 0,
            since: 0,
            visits: 0,
            innocent: 0,
            seen: true,
        }
    }

    const fn give(&mut self, cause: Cause, since: u64) {
        (self.active, self.cause, self.since) = (true, cause, since);
        (self.visits, self.innocent, self.seen) = (0, 0, true);
    }

    fn take_back(&mut self) {
        (self.active, self.count, self.innocent) = (false, 0, 0);
        self.returns = (self.returns + 1).min(MAX_DOUBLINGS);
    }
}

/// Counters by cause.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Visits to the slow path (those that fill the TLB only are not among them).
    pub visits: [u64; Cause::ALL.len()],
    /// Hints given.
    pub adaptations: [u64; Cause::ALL.len()],
    /// Hints taken back.
    pub returns: [u64; Cause::ALL.len()],
    /// Direct calls.
    pub direct: [u64; Cause::ALL.len()],
}

/// Where a visit came from.
#[derive(Clone, Copy)]
struct At {
    gfn: Gfn,
    offset: u16,
    fragment: u32,
    /// How many fragments were made before it, and in all.
    made: u64,
    all: u64,
}

/// The records of a vCPU's code.
pub struct Adaptation {
    settings: Settings,
    frames: FxHashMap<Gfn, Vec<Record>>,
    /// The frames, in the order in which they came.
    order: VecDeque<Gfn>,
    records: usize,
    /// Fragments to drop before translated code runs again.
    pending: Vec<u32>,
    /// When the last sample of failing groups came.
    sampled: Option<Instant>,
    turns: u32,
    /// The frame whose round is next.
    next: usize,
    /// Counters.
    pub counts: Counts,
}

impl Adaptation {
    /// Nothing is known.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            frames: FxHashMap::default(),
            order: VecDeque::new(),
            records: 0,
            pending: Vec::new(),
            sampled: None,
            turns: 0,
            next: 0,
            counts: Counts::default(),
        }
    }

    /// How many instructions are watched.
    pub const fn len(&self) -> usize {
        self.records
    }

    /// The hints for code of a frame.
    pub fn hints(&self, gfn: Gfn, unit: &Unit) -> Hints {
        let mut hints = Hints::new();
        if self.settings.forced {
            for i in &unit.instructions {
                let forms = [Form::Alone, Form::Halves, Form::Halves, Form::Direct];
                let offset = i.ip16();
                hints.add(offset, forms[usize::from((offset ^ offset >> 2) & 3)]);
            }
        }
        for r in self.frames.get(&gfn).into_iter().flatten().filter(|r| r.active) {
            hints.add(r.offset, r.form);
        }
        hints
    }

    /// The code of a frame is another now.
    pub fn forget(&mut self, gfn: Gfn) {
        if let Some(records) = self.frames.remove(&gfn) {
            self.records -= records.len();
            self.order.retain(|g| *g != gfn);
        }
    }

    /// All code is another now.
    pub fn forget_all(&mut self) {
        self.frames.clear();
        self.order.clear();
        self.records = 0;
        self.pending.clear();
    }

    /// All fragments are gone.
    pub fn fragments_gone(&mut self) {
        self.pending.clear();
    }

    fn find(&mut self, at: At, form: Form) -> Option<&mut Record> {
        self.frames.get_mut(&at.gfn)?.iter_mut().find(|r| r.offset == at.offset && r.form == form)
    }

    fn record(&mut self, at: At, form: Form, cause: Cause) -> Option<&mut Record> {
        if self.find(at, form).is_none() {
            while self.records >= MAX_RECORDS {
                let oldest = self.order.front().copied()?;
                self.forget(oldest);
            }
            if !self.frames.contains_key(&at.gfn) {
                self.order.push_back(at.gfn);
            }
            self.frames.entry(at.gfn).or_default().push(Record::new(at.offset, form, cause));
            self.records += 1;
        }
        self.find(at, form)
    }

    fn make_anew(&mut self, fragment: u32) {
        if !self.settings.forced && self.pending.len() < MAX_PENDING && !self.pending.contains(&fragment) {
            self.pending.push(fragment);
        }
    }

    /// The innocent form failed, `weight` times.
    fn blame(&mut self, at: At, cause: Cause, weight: u32) {
        self.counts.visits[cause as usize] += u64::from(weight);
        let threshold = self.settings.threshold;
        let Some(form) = cause.form().filter(|_| threshold != 0) else { return };
        let Some(r) = self.record(at, form, cause) else { return };
        (r.seen, r.innocent) = (true, 0);
        if r.active {
            // The fragment is older than the hint, or has no use for it.
            if at.made < r.since {
                self.make_anew(at.fragment);
            }
            return;
        }
        r.count = r.count.saturating_add(weight);
        if r.count >= threshold.saturating_mul(1 << r.returns) {
            r.give(cause, at.all);
            self.counts.adaptations[cause as usize] += 1;
            self.make_anew(at.fragment);
        }
    }

    /// The check of a group failed, `weight` times, because of `why`.
    fn blame_group(&mut self, at: At, why: Cause, weight: u32) {
        let memory = matches!(why, Cause::Crossing | Cause::Alignment | Cause::BesideCode);
        if memory && self.settings.threshold > 1 && !self.is_hot(weight) {
            self.counts.visits[Cause::Group as usize] += u64::from(weight);
            return;
        }
        self.blame(at, Cause::Group, weight);
    }

    /// Whether groups fail often just now. Asked with each sample of them, which stands for `weight` failures.
    fn is_hot(&mut self, weight: u32) -> bool {
        if weight < self.settings.sample {
            return false;
        }
        let now = Instant::now();
        let last = self.sampled.replace(now);
        last.is_some_and(|last| now.duration_since(last) < HOT * weight)
    }

    /// A first form went on in its second.
    fn blame_adapted(&mut self, at: At, weight: u32) {
        self.counts.visits[Cause::Crossing as usize] += u64::from(weight);
        match self.find(at, Form::Halves) {
            Some(r) if r.active => (r.seen, r.innocent) = (true, 0),
            _ => self.make_anew(at.fragment),
        }
    }

    /// A direct call. True: it is to be looked at.
    fn direct(&mut self, at: At) -> bool {
        let sample = self.settings.sample;
        match self.find(at, Form::Direct) {
            Some(r) if r.active => {
                r.visits = r.visits.wrapping_add(1);
                let (due, cause) = (r.visits.is_multiple_of(sample), r.cause);
                self.counts.direct[cause as usize] += 1;
                due
            }
            _ => {
                self.make_anew(at.fragment);
                false
            }
        }
    }

    /// What a look at a direct call showed.
    fn looked(&mut self, at: At, innocent: bool) {
        let patience = self.settings.patience;
        let Some(r) = self.find(at, Form::Direct).filter(|r| r.active) else { return };
        r.innocent = if innocent { r.innocent.saturating_add(1) } else { 0 };
        if r.innocent >= patience {
            r.take_back();
            let cause = r.cause;
            self.counts.returns[cause as usize] += 1;
            self.make_anew(at.fragment);
        }
    }

    /// A turn of the dispatcher. The frame whose fragments are to be made anew, because hints were taken back.
    fn tick(&mut self) -> Option<Gfn> {
        self.turns += 1;
        if self.turns < self.settings.round {
            return None;
        }
        self.turns = 0;
        self.next = if self.next + 1 < self.order.len() { self.next + 1 } else { 0 };
        let gfn = *self.order.get(self.next)?;
        let rounds = self.settings.rounds;
        let mut any = false;
        for r in self.frames.get_mut(&gfn).into_iter().flatten() {
            let seen = std::mem::take(&mut r.seen);
            if !r.active {
                r.count /= 2;
            } else if r.form != Form::Direct && !seen {
                r.innocent = r.innocent.saturating_add(1);
                if r.innocent >= rounds {
                    r.take_back();
                    self.counts.returns[r.cause as usize] += 1;
                    any = true;
                }
            }
        }
        any.then_some(gfn)
    }
}

impl BtVcpu {
    fn at(&self, placed: &PlacedSite) -> At {
        let (fragment, made) = (placed.fragment, placed.made);
        At { gfn: placed.gfn, offset: placed.site.guest, fragment, made, all: self.cache.made() }
    }

    fn ring_if_pending(&self) {
        if !self.adapt.pending.is_empty() {
            self.frame.ring();
        }
    }

    /// The innocent form of a site failed, `weight` times.
    pub(crate) fn blame(&mut self, placed: &PlacedSite, cause: Cause, weight: u32) {
        let at = self.at(placed);
        self.adapt.blame(at, cause, weight);
        self.ring_if_pending();
    }

    /// The check of a site's group failed because of `why`.
    pub(crate) fn blame_group(&mut self, placed: &PlacedSite, why: Cause, weight: u32) {
        let at = self.at(placed);
        self.adapt.blame_group(at, why, weight);
        self.ring_if_pending();
    }

    /// A site goes on in its second form, for `weight` times.
    pub(crate) fn blame_adapted(&mut self, placed: &PlacedSite, weight: u32) {
        let at = self.at(placed);
        self.adapt.blame_adapted(at, weight);
        self.ring_if_pending();
    }

    /// A direct call from a site. `is_innocent` says whether its innocent form would have worked.
    pub(crate) fn visit_direct(&mut self, placed: &PlacedSite, is_innocent: impl FnOnce(&mut Self) -> bool) {
        let at = self.at(placed);
        if self.adapt.direct(at) {
            let innocent = is_innocent(self);
            self.adapt.looked(at, innocent);
        }
        self.ring_if_pending();
    }

    /// The next failures of groups until one comes to Rust.
    pub(crate) fn begin_sampling(&self) {
        self.frame.set32(bt::frame::SAMPLE, self.adapt.settings.sample - 1);
    }

    /// How many failures the visit that just came stands for: those of groups and first forms come to Rust as a sample.
    pub(crate) fn sample_weight(&self) -> u32 {
        if self.frame.get32(bt::frame::SAMPLE).cast_signed() >= 0 {
            return 1;
        }
        self.begin_sampling();
        self.adapt.settings.sample
    }

    /// Drops what is to be made anew. No fragment runs.
    pub(crate) fn adapt(&mut self) {
        while let Some(fragment) = self.adapt.pending.pop() {
            self.cache.discard(fragment);
        }
        if let Some(gfn) = self.adapt.tick() {
            self.cache.drop_frame(gfn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(gfn: u64, offset: u16, fragment: u32) -> At {
        At { gfn: Gfn(gfn), offset, fragment, made: fragment as u64, all: fragment as u64 + 1 }
    }

    impl Adaptation {
        fn given(&self, gfn: u64) -> Hints {
            let unit = Unit { instructions: Vec::new(), end: 0, hints: Hints::new() };
            self.hints(Gfn(gfn), &unit)
        }
    }

    fn adapted() -> Adaptation {
        let mut a = Adaptation::new(Settings::new(4));
        (0..4).for_each(|_| a.blame(at(1, 8, 0), Cause::Device, 1));
        a
    }

    #[test]
    fn threshold_gives_the_hint_once() {
        let mut a = Adaptation::new(Settings::new(4));
        (0..3).for_each(|_| a.blame(at(1, 8, 0), Cause::Device, 1));
        assert!(a.given(1).is_empty() && a.pending.is_empty());
        a.blame(at(1, 8, 0), Cause::Device, 1);
        assert!(a.given(1).has(8, Form::Direct) && a.given(2).is_empty());
        assert_eq!(a.pending, [0]);
        a.pending.clear();
        // Another fragment made before, and one made since, which has no use for the hint.
        a.blame(at(1, 8, 0), Cause::Device, 1);
        assert_eq!(a.pending, [0]);
        a.pending.clear();
        a.blame(At { fragment: 5, made: 5, ..at(1, 8, 0) }, Cause::Device, 1);
        assert!(a.pending.is_empty());
        assert_eq!(a.counts.adaptations[Cause::Device as usize], 1);
    }

    #[test]
    fn innocent_samples_in_a_row_take_the_hint_back_and_double_the_threshold() {
        let mut a = adapted();
        a.pending.clear();
        for n in 0..7 {
            a.looked(at(1, 8, 1), n != 3);
        }
        assert!(a.given(1).has(8, Form::Direct));
        (0..8).for_each(|_| a.looked(at(1, 8, 1), true));
        assert!(a.given(1).is_empty());
        assert_eq!(a.pending, [1]);
        (0..7).for_each(|_| a.blame(at(1, 8, 2), Cause::Device, 1));
        assert!(a.given(1).is_empty());
        a.blame(at(1, 8, 2), Cause::Device, 1);
        assert!(a.given(1).has(8, Form::Direct));
    }

    #[test]
    fn direct_calls_without_a_hint_are_made_anew() {
        let mut a = adapted();
        a.pending.clear();
        a.forget(Gfn(1));
        assert!(!a.direct(at(1, 8, 3)));
        assert_eq!((a.pending.as_slice(), a.len()), ([3].as_slice(), 0));
    }

    #[test]
    fn second_forms_that_nobody_blames_are_taken_back() {
        let mut a = Adaptation::new(Settings::new(1));
        a.blame(at(1, 8, 0), Cause::Crossing, 1);
        let round = a.settings.round;
        let rounds = |a: &mut Adaptation, n: u32| (0..n * round).filter_map(|_| a.tick()).count();
        assert_eq!(rounds(&mut a, 1), 0);
        a.blame_adapted(at(1, 8, 1), 1);
        assert_eq!(rounds(&mut a, 2), 0);
        assert_eq!(rounds(&mut a, 1), 1);
        assert!(a.given(1).is_empty());
        assert_eq!(a.counts.returns[Cause::Crossing as usize], 1);
    }

    #[test]
    fn ever_new_sites_take_no_more_memory_than_the_bound() {
        let mut a = Adaptation::new(Settings::new(1));
        for n in 0..100_000u64 {
            a.blame(at(n / 3, u16::try_from(n % 3).unwrap(), 0), Cause::Device, 1);
            assert!(a.len() <= MAX_RECORDS && a.order.len() <= MAX_RECORDS && a.pending.len() <= MAX_PENDING);
        }
        assert_eq!(a.len(), a.frames.values().map(Vec::len).sum::<usize>());
        // All in one frame.
        for n in 0..10_000u64 {
            a.blame(at(1 << 40, u16::try_from(n).unwrap(), 0), Cause::Crossing, 1);
            assert!(a.len() <= MAX_RECORDS);
        }
    }

    #[test]
    fn groups_that_seldom_cross_stay() {
        let mut a = Adaptation::new(Settings::new(4));
        for _ in 0..20 {
            // The sample before is long past.
            a.sampled = Instant::now().checked_sub(Duration::from_secs(1));
            a.blame_group(at(1, 8, 0), Cause::Crossing, 16);
        }
        assert_eq!((a.len(), a.counts.visits[Cause::Group as usize]), (0, 320));
        // A device is never worth the check.
        (0..4).for_each(|_| a.blame_group(at(1, 8, 0), Cause::Device, 1));
        assert!(a.given(1).has(8, Form::Alone));
    }

    #[test]
    fn off_counts_and_keeps_nothing() {
        let mut a = Adaptation::new(Settings::new(0));
        (0..1000).for_each(|_| a.blame(at(1, 8, 0), Cause::Device, 1));
        assert_eq!((a.len(), a.counts.visits[Cause::Device as usize]), (0, 1000));
    }
}

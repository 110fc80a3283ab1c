//! A profile of a vCPU: samples (`sample`) told apart by what was there: a fragment's host instruction, which is some guest instruction's and
//! for some purpose (`classify`); assembly around fragments; the engine.
//!
//! Samples are looked at while no fragment runs, and before fragments are forgotten, whose places others take.

use std::collections::BTreeMap;
use std::ops::Range;

use bt::{Fragment, Place};
use engine::profile::{Profile, Site};
use rustc_hash::FxHashMap;

use crate::BtVcpu;
use crate::classify::{Purpose, purposes};
use crate::sample::{Activity, Sample, Sampler};

/// What is known of a fragment's code.
struct Code {
    bytes: Box<[u8]>,
    map: Box<[Place]>,
    straight: usize,
    user: bool,
    /// RIP of its page's first byte, or 0: the frame says.
    page_rip: u64,
    /// Offsets of host instructions and what they are for, once a sample asked.
    purposes: Vec<(usize, Purpose)>,
}

impl Code {
    fn new(fragment: &Fragment, user: bool, page_rip: u64) -> Self {
        Self {
            bytes: fragment.code.as_slice().into(),
            map: fragment.map.as_slice().into(),
            straight: fragment.straight,
            user,
            page_rip,
            purposes: Vec::new(),
        }
    }

    /// The guest instruction that an offset belongs to: its offset in the page, and how many host instructions were made of it on the
    /// straight line. Code out of line is the unit's first's.
    fn guest(&self, offset: usize) -> (u16, usize) {
        let n =
            if offset < self.straight { self.map.partition_point(|p| p.host as usize <= offset) } else { 0 };
        let n = n.saturating_sub(1);
        let from = if n == 0 { 0 } else { self.map.get(n).map_or(0, |p| p.host as usize) };
        let to = self.map.get(n + 1).map_or(self.straight, |p| p.host as usize);
        let count = self.purposes.iter().filter(|(at, _)| (from..to).contains(at)).count();
        (self.map.get(n).map_or(0, |p| p.guest), count.max(1))
    }

    fn purpose(&mut self, offset: usize) -> Purpose {
        if self.purposes.is_empty() {
            self.purposes = purposes(&self.bytes);
        }
        let n = self.purposes.partition_point(|(at, _)| *at <= offset);
        let found = n.checked_sub(1).and_then(|n| self.purposes.get(n)).map(|(_, purpose)| *purpose);
        match found {
            // Out of line is what a check that failed does.
            Some(Purpose::Guest) if offset >= self.straight => Purpose::Check,
            found => found.unwrap_or(Purpose::Other),
        }
    }
}

/// A vCPU's profile in the making.
pub(crate) struct Profiler {
    pub sampler: Sampler,
    profile: Profile,
    codes: FxHashMap<u32, Code>,
    /// Where fragments are: the first host address, and how long; also the places that they moved away from.
    places: BTreeMap<u64, (u64, u32)>,
    code_range: Range<u64>,
    assembly: Vec<(u64, &'static str)>,
}

impl Profiler {
    fn new(sampler: Sampler, hz: u32, code_range: Range<u64>) -> Self {
        let mut assembly = crate::exec::assembly();
        assembly.sort_unstable();
        Self {
            sampler,
            profile: Profile { hz, ..Profile::default() },
            codes: FxHashMap::default(),
            places: BTreeMap::new(),
            code_range,
            assembly,
        }
    }

    fn at(&mut self, number: u32, address: u64, len: usize) {
        self.places.insert(address, (len as u64, number));
    }

    /// Looks at what was sampled.
    fn drain(&mut self) {
        let (samples, lost) = self.sampler.tap().drain();
        self.profile.samples += samples.len() as u64 + lost;
        self.profile.lost += lost;
        samples.iter().for_each(|sample| self.take(sample));
    }

    fn take(&mut self, sample: &Sample) {
        let p = &mut self.profile;
        if self.code_range.contains(&sample.host) {
            *p.places.entry("translated").or_default() += 1;
            return self.take_translated(sample);
        }
        let activity = Activity::ALL.get(usize::from(sample.activity)).copied();
        match activity {
            Some(Activity::Fragments) => {
                *p.places.entry("assembly").or_default() += 1;
                let n = self.assembly.partition_point(|(at, _)| *at <= sample.host);
                let before = n.checked_sub(1).and_then(|n| self.assembly.get(n));
                // Each of them is short; what is farther is Rust between them and the first span.
                let name =
                    before.filter(|(at, _)| sample.host - at < 1024).map_or("other", |(_, name)| *name);
                *p.assembly.entry(name).or_default() += 1;
            }
            _ => {
                *p.places.entry("engine").or_default() += 1;
                *p.engine.entry(activity.map_or("other", Activity::name)).or_default() += 1;
            }
        }
    }

    fn take_translated(&mut self, sample: &Sample) {
        let p = &mut self.profile;
        let place = self.places.range(..=sample.host).next_back();
        let place = place.filter(|(at, (len, _))| sample.host - **at < *len);
        let found = place.and_then(|(at, (_, number))| {
            Some((usize::try_from(sample.host - at).ok()?, self.codes.get_mut(number)?))
        });
        let Some((offset, code)) = found else {
            *p.categories.entry("unknown").or_default() += 1;
            return;
        };
        let purpose = code.purpose(offset);
        *p.categories.entry(purpose.name()).or_default() += 1;
        let (guest, host_instructions) = code.guest(offset);
        let page_rip = if code.page_rip == 0 { sample.page_rip } else { code.page_rip };
        let cr3 = if code.user { sample.cr3 & 0x000f_ffff_ffff_f000 } else { 0 };
        p.at(Site { rip: page_rip.wrapping_add(u64::from(guest)), user: code.user, cr3 });
        #[expect(clippy::cast_precision_loss, reason = "some instructions")]
        let share = 1.0 / host_instructions as f64;
        p.guest_instructions += share;
        p.host_instructions += 1.0;
    }
}

impl BtVcpu {
    /// From now on, samples are taken so often a second. False: the host gives no timers for it.
    pub fn profile(&mut self, hz: u32) -> bool {
        let Some(sampler) = Sampler::new(self.frame.address(0), hz) else { return false };
        self.profiler = Some(Box::new(Profiler::new(sampler, hz, self.cache.code_range())));
        true
    }

    /// A run begins or ends.
    pub(crate) fn sample(&mut self, on: bool) {
        let Some(profiler) = &mut self.profiler else { return };
        if on { profiler.sampler.begin() } else { profiler.sampler.end() }
    }

    /// The engine does this from now on; what it did before.
    #[inline]
    pub(crate) fn does(&self, activity: Activity) -> u8 {
        self.did(activity as u8)
    }

    /// It does again what it did before.
    #[inline]
    pub(crate) fn did(&self, activity: u8) -> u8 {
        self.profiler.as_ref().map_or(0, |p| p.sampler.tap().set(activity))
    }

    /// Looks at the samples, if there are any.
    #[inline]
    pub(crate) fn look_at_samples(&mut self) {
        if let Some(profiler) = &mut self.profiler
            && profiler.sampler.tap().has_samples()
        {
            profiler.drain();
        }
    }

    /// A fragment was made.
    pub(crate) fn profile_made(&mut self, number: u32, fragment: &Fragment) {
        let (address, user) = (self.cache.address(number), self.cache.is_user(number));
        let page_rip = self.cache.key(number).map_or(0, |key| key.page_rip);
        if let Some(p) = &mut self.profiler {
            p.drain();
            p.codes.insert(number, Code::new(fragment, user, page_rip));
            p.at(number, address, fragment.code.len());
        }
    }

    /// A fragment may have moved.
    pub(crate) fn profile_moved(&mut self, number: u32) {
        let (address, len) = (self.cache.address(number), self.cache.code_of(number).len());
        if let Some(p) = &mut self.profiler {
            p.at(number, address, len);
        }
    }

    /// The fragments at these host addresses are gone.
    pub(crate) fn profile_gone(&mut self, range: &Range<u64>) {
        let Some(p) = &mut self.profiler else { return };
        p.drain();
        p.places.retain(|at, _| !range.contains(at));
        if p.codes.len() > 2 * p.places.len() + 1000 {
            let there: rustc_hash::FxHashSet<u32> = p.places.values().map(|(_, number)| *number).collect();
            p.codes.retain(|number, _| there.contains(number));
        }
    }

    /// What was found so far.
    pub(crate) fn profile_so_far(&self) -> Option<Box<Profile>> {
        self.profiler.as_ref().map(|p| Box::new(p.profile.clone()))
    }
}

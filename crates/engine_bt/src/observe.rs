//! Who watches a vCPU's translations: a trace, a profiler's files, counts of leaves. The engine tells them here.

use std::sync::{Arc, Mutex, PoisonError};

use bt::unit::Unit;
use bt::{Facts, Fragment, Variant};

use crate::BtVcpu;
use crate::listing::{Listing, Source, rights};
use crate::perf_map::Profile;
use crate::trace::{Leave, Trace};

/// The watchers, and what is kept for them between two events.
#[derive(Default)]
pub(crate) struct Observers {
    pub trace: Option<Box<Trace>>,
    pub profile: Option<Arc<Mutex<Profile>>>,
    /// Leaves of the cache, by [`Leave`].
    pub leaves: [u64; Leave::ALL.len()],
    /// The last instruction that the interpreter did for a fragment does not go on in it.
    pub refused: bool,
}

/// A translation just made.
pub(crate) struct Made<'a> {
    pub unit: &'a Unit,
    pub page: &'a [u8; 4096],
    /// The first bytes of the next page, if the unit reaches there.
    pub next: &'a [u8],
    pub fragment: &'a Fragment,
    pub variant: Variant,
    /// Without groups of accesses.
    pub plain: bool,
    /// Numbers of its first site and exit.
    pub bases: (u32, u32),
}

impl<'a> Made<'a> {
    /// A translation of `unit`, which reaches into `next`, for `facts`.
    pub fn new(
        unit: &'a Unit,
        page: &'a [u8; 4096],
        next: &'a [u8],
        fragment: &'a Fragment,
        facts: Facts,
        bases: (u32, u32),
    ) -> Self {
        Self { unit, page, next, fragment, variant: facts.variant, plain: facts.plain, bases }
    }
}

impl BtVcpu {
    /// From now on, what happens is told to these.
    pub fn observe(&mut self, trace: Option<Trace>, profile: Option<Arc<Mutex<Profile>>>) {
        self.observers.trace = trace.map(Box::new);
        self.observers.profile = profile;
    }

    /// Tells of a fragment.
    pub(crate) fn note_made(&mut self, number: Option<u32>, made: &Made<'_>) {
        let Some(number) = number else { return };
        if self.profiler.is_some() {
            self.profile_made(number, made.fragment);
        }
        if !self.observers.any() {
            return;
        }
        let host = self.cache.address(number);
        let rip = self.interp.cpu().rip;
        if let Some(profile) = &self.observers.profile {
            let level = if made.variant == Variant::User { 'u' } else { 'k' };
            profile.lock().unwrap_or_else(PoisonError::into_inner).add(
                host,
                &made.fragment.code,
                &format!("guest:{level}:{rip:x}"),
            );
        }
        if let Some(trace) = self.observers.trace.as_ref().filter(|t| t.range.contains(rip)) {
            trace_made(trace, made, rip, host);
        }
    }

    /// Tells that a fragment may have moved.
    pub(crate) fn note_moved(&mut self, fragment: u32) {
        self.profile_moved(fragment);
        let Some(profile) = &self.observers.profile else { return };
        let level = if self.cache.is_user(fragment) { 'u' } else { 'k' };
        let rip = self.interp.cpu().rip;
        profile.lock().unwrap_or_else(PoisonError::into_inner).add(
            self.cache.address(fragment),
            self.cache.code_of(fragment),
            &format!("guest:{level}:{rip:x}"),
        );
    }

    /// Tells that the fragments at these host addresses are gone.
    pub(crate) fn note_gone(&mut self, range: &std::ops::Range<u64>) {
        self.profile_gone(range);
        if let Some(profile) = &self.observers.profile {
            profile.lock().unwrap_or_else(PoisonError::into_inner).forget(range);
        }
    }

    /// Tells that all fragments are gone.
    pub(crate) fn note_flush(&mut self) {
        let all = self.cache.code_range();
        self.profile_gone(&all);
        if let Some(profile) = &self.observers.profile {
            profile.lock().unwrap_or_else(PoisonError::into_inner).forget(&self.cache.code_range());
        }
    }
}

impl Observers {
    fn any(&self) -> bool {
        self.profile.is_some() || self.trace.as_ref().is_some_and(|t| t.levels.fragments || t.levels.code)
    }
}

fn trace_made(trace: &Trace, made: &Made<'_>, rip: u64, host: u64) {
    let start = usize::from(made.fragment.map.first().map_or(0, |place| place.guest));
    let len = made.unit.end.saturating_sub(start);
    if trace.levels.fragments {
        (trace.write)(format_args!(
            "fragment {rip:016x}-{:016x} {}{} {} instructions {len} bytes {} host bytes at {host:#x}",
            rip.wrapping_add(len as u64),
            rights(made.variant),
            if made.plain { " plain" } else { "" },
            made.fragment.map.len(),
            made.fragment.code.len(),
        ));
    }
    if trace.levels.code {
        let mut bytes = made.page.get(start..).unwrap_or_default().to_vec();
        bytes.extend_from_slice(made.next);
        let source = Source {
            unit: made.unit,
            bytes: &bytes,
            fragment: made.fragment,
            page_rip: rip & !0xfff,
            variant: made.variant,
            bases: made.bases,
        };
        (trace.write)(format_args!("code at {host:#x}\n{}", Listing::new(&source).render(false)));
    }
}

//! The translator's account of its work, for `--stats`: made when it is asked for, from counters that Rust code keeps, and two that the
//! second-level lookups keep in the frame. Translated code counts nothing.

use bt::frame;
use engine::Report;
use engine::report::{Base, Breakdown, Form, Ratio, Unit};

use crate::BtVcpu;
use crate::account::HELPED;
use crate::adapt::Cause;
use crate::listing::form_of;
use crate::trace::Leave;

const RATIOS: &[Ratio] = &[
    percent("translation of the time", &["translation time"], Base::BusyTime),
    plain("host bytes per guest byte", &["host code made"], &["guest code translated"]),
    plain("host bytes per guest instruction", &["host code made"], &["guest instructions translated"]),
    percent("TC hit rate", &["TC hits"], Base::Counters(&["TC hits", "TC misses"])),
    percent("chain rate", &["links made"], Base::Counters(&["direct exits made"])),
    percent(
        "TLB misses at the second level",
        &["TLB second-level hits"],
        Base::Counters(&["TLB second-level hits", "TLB misses"]),
    ),
    percent("code memory in use", &["code memory used"], Base::Counters(&["code memory"])),
];

const fn percent(name: &'static str, of: &'static [&'static str], by: Base) -> Ratio {
    Ratio { name, of, by, form: Form::Percent }
}

const fn plain(name: &'static str, of: &'static [&'static str], by: &'static [&'static str]) -> Ratio {
    Ratio { name, of, by: Base::Counters(by), form: Form::Plain }
}

impl BtVcpu {
    /// What this vCPU's translator did and has.
    pub(crate) fn make_report(&self) -> Report {
        let mut r = Report { interpreted_only: true, ratios: RATIOS.to_vec(), ..Report::default() };
        self.counters(&mut r);
        self.memory(&mut r);
        let callouts = self.account.callouts().map(|(code, n)| (form_of(code), n));
        let leaves = Leave::ALL.iter().map(|l| (l.name().to_owned(), self.observers.leaves[*l as usize]));
        let c = &self.adapt.counts;
        let mut adapted = c.direct;
        adapted[Cause::Crossing as usize] = self.frame.get(frame::COUNT_SPLITS);
        r.breakdowns = vec![
            by_cause("visits to the slow path", &c.visits),
            by_cause("adaptations by cause", &c.adaptations),
            by_cause("returns to innocence", &c.returns),
            by_cause("visits by adapted sites", &adapted),
            Breakdown { name: "leaves of the cache", rows: sum(leaves) },
            Breakdown { name: "callouts by instruction", rows: sum(callouts) },
        ];
        r.costs = self.cost_rows();
        r.profile = self.profile_so_far();
        r
    }

    fn counters(&self, r: &mut Report) {
        let s = &self.bt;
        r.count("translation time", Unit::Nanoseconds, s.translation_ns);
        r.count("fragments made", Unit::Count, s.fragments);
        r.count("guest instructions translated", Unit::Count, s.translated);
        r.count("guest code translated", Unit::Bytes, s.guest_bytes);
        r.count("host code made", Unit::Bytes, s.translated_bytes);
        r.count("TC entries", Unit::Count, s.entries);
        r.count("TC hits", Unit::Count, s.found);
        r.count("TC misses", Unit::Count, s.not_found);
        r.count("direct exits made", Unit::Count, s.direct_exits);
        r.count("links made", Unit::Count, s.links);
        r.count("jump-cache refills", Unit::Count, self.frame.get(frame::COUNT_LOOKUPS));
        r.count("TLB second-level hits", Unit::Count, self.frame.get(frame::COUNT_REFILLS));
        r.count("TLB misses", Unit::Count, s.misses);
        r.count("callouts", Unit::Count, s.callouts);
        r.count("callouts that only reach a device", Unit::Count, s.quick);
        for (what, at) in HELPED.iter().zip((frame::COUNT_HELPED..).step_by(8)) {
            r.count(what, Unit::Count, self.frame.get(at));
        }
        r.count("went on elsewhere", Unit::Count, s.onward);
        r.count("page faults at misses", Unit::Count, s.faults);
        r.count("page faults delivered on the frame", Unit::Count, s.delivered);
        r.count("groups not checked", Unit::Count, s.plain_exits);
        r.count("adaptations", Unit::Count, self.adapt.counts.adaptations.iter().sum());
        r.count("blocks interpreted", Unit::Count, s.blocks);
        r.count("fragments suspended", Unit::Count, s.suspended);
        r.count("fragments resumed", Unit::Count, s.resumed);
        r.count("fragments dropped", Unit::Count, s.dropped);
        r.count("fragments that check themselves", Unit::Count, s.checked);
        r.count("checks failed", Unit::Count, s.check_failures);
        r.count("fragments traced again", Unit::Count, s.acquitted);
        r.count("pages shared with data", Unit::Count, s.shared_pages);
        r.count("writes beside code", Unit::Count, self.frame.get(frame::COUNT_PASSED));
        let e = self.cache.evictions;
        r.count("segments emptied", Unit::Count, e.segments);
        r.count("fragments evicted", Unit::Count, e.fragments);
        r.count("code evicted", Unit::Bytes, e.bytes);
        r.count("fragments kept", Unit::Count, e.moved);
        r.count("code kept", Unit::Bytes, e.moved_bytes);
        r.count("code dropped", Unit::Bytes, e.dropped_bytes);
        r.count("flushes", Unit::Count, s.flushes);
    }

    fn memory(&self, r: &mut Report) {
        let range = self.cache.code_range();
        r.gauge("fragments in the TC", Unit::Count, self.cache.len() as u64);
        r.gauge("sites watched", Unit::Count, self.adapt.len() as u64);
        r.gauge("code memory used", Unit::Bytes, self.cache.code_bytes() as u64);
        r.gauge("code memory", Unit::Bytes, range.end - range.start);
        r.gauge("TC tables", Unit::Bytes, self.cache.table_bytes() as u64);
        let second_jumps = 16 * frame::SECOND_JUMP_ENTRIES;
        let entries = x86_interp::tlb::SETS * frame::VARIANTS as usize;
        let second_tlb = (entries * std::mem::size_of::<x86_interp::tlb::Entry>()) as u64;
        r.gauge("TLB and jump cache", Unit::Bytes, frame::SIZE as u64 + second_jumps + second_tlb);
    }
}

fn by_cause(name: &'static str, counts: &[u64; Cause::ALL.len()]) -> Breakdown {
    let rows = Cause::ALL.iter().map(|c| (c.name().to_owned(), counts[*c as usize]));
    Breakdown { name, rows: sum(rows.filter(|(_, n)| *n != 0)) }
}

fn sum(rows: impl Iterator<Item = (String, u64)>) -> std::collections::BTreeMap<String, u64> {
    let mut all = std::collections::BTreeMap::new();
    rows.for_each(|(kind, n)| *all.entry(kind).or_default() += n);
    all
}

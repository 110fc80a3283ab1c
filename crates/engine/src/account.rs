//! What exits cost: spans of time-stamp counter ticks between the end of guest execution and its going on, measured where that does not
//! disturb, and sampled where it would.
//!
//! A [`Meter`] belongs to a vCPU and is used by its thread only. A span begins and ends in Rust ([`Meter::begin`], [`Meter::end`]) and counts for an
//! [`Entry`], one for each cause. Spans nest, and each counts what it takes *by itself*: a device access inside of an instruction that the
//! interpreter does is the device's, not the instruction's (`INV-ACC-1`: so the sums of all entries never exceed the time that passed).
//!
//! Cost: RDTSC takes 9 to 25 ns on virtualized hosts, and some exits only 50. So each cause is timed at every exit while it is rare, and else at one
//! of some: the period doubles while samples are closer than [`Calibration::distance`], 800 times what one takes, and the exits between two of them are as many as a
//! random number says, so that nothing periodic in the guest is met always or never. A busy cause thus costs an eighth of a percent. The count is exact
//! always, an exit that is not timed costs a decrement. Where a span is timed, those inside of it are, too.

use std::sync::OnceLock;

use crate::host_tsc::rdtsc;

/// The greatest period.
const MAX_PERIOD: u32 = 1 << 20;
/// Samples of a cause are this many times their own cost apart, at least about.
const DISTANCE: u64 = 800;
/// So many times the average are taken for an interruption.
const FAR: u64 = 32;

/// What measuring takes on this host, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// What each span has too much: an empty one's ticks, where it is one of many that are not measured (so that the processor expects
    /// that it is not).
    pub reading: u64,
    /// Measuring a span, all in all.
    pub measurement: f64,
    /// A span that is not measured.
    pub event: f64,
}

impl Calibration {
    /// This host's. The first call takes about a millisecond.
    pub fn get() -> Self {
        static KNOWN: OnceLock<Calibration> = OnceLock::new();
        *KNOWN.get_or_init(Self::measure)
    }

    fn measure() -> Self {
        const ROUNDS: u32 = 1000;
        // Interruptions only ever add: the least is the cost.
        let least = |f: &mut dyn FnMut()| {
            let of_batch = |_| {
                let from = rdtsc();
                (0..ROUNDS).for_each(|_| f());
                rdtsc().saturating_sub(from)
            };
            let ticks = (0..8).map(of_batch).min().unwrap_or(0);
            #[expect(clippy::cast_precision_loss, reason = "some thousand ticks")]
            let each = ticks as f64 / f64::from(ROUNDS);
            each
        };
        let mut meter = Meter::with(Self { reading: 0, measurement: 0.0, event: 0.0 });
        let mut always = Entry::default();
        let measurement = least(&mut || {
            let span = meter.begin(&mut always);
            std::hint::black_box(&mut meter).end(&mut always, span);
        });
        let mut never = Entry { left: u32::MAX, ..Entry::default() };
        let event = least(&mut || {
            let span = meter.begin(&mut never);
            std::hint::black_box(&mut meter).end(&mut never, span);
        });
        let hot = (0..1000).map(|_| rdtsc().abs_diff(rdtsc())).min().unwrap_or(0);
        let reading = Self::empty_span(&mut meter).max(hot);
        #[expect(clippy::cast_precision_loss, reason = "some ticks")]
        let unexpected = (reading - hot) as f64;
        Self { reading, measurement: measurement + unexpected, event }
    }

    /// The median of empty spans, one of some sixty of which is measured.
    fn empty_span(meter: &mut Meter) -> u64 {
        let mut entry = Entry::default();
        let mut spans = Vec::new();
        let mut before = 0;
        for _ in 0..32_000 {
            let span = meter.begin(&mut entry);
            std::hint::black_box(&mut *meter).end(&mut entry, span);
            if span.is_timed() {
                spans.push(entry.ticks - std::mem::replace(&mut before, entry.ticks));
                entry.left = meter.random % 128;
                entry.skipped = 0;
            }
        }
        spans.sort_unstable();
        spans.get(spans.len() / 2).copied().unwrap_or(0)
    }

    /// How far apart samples of one cause are, at least about.
    fn distance(&self) -> u64 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some hundred ticks")]
        let measurement = self.measurement as u64;
        DISTANCE * measurement
    }
}

/// A cause's account.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// How often it happened.
    pub count: u64,
    /// How many of them were timed.
    pub measured: u64,
    /// For how many those stand.
    weight: u64,
    /// Ticks that all of those took.
    ticks: u64,
    /// Exits until the next that is timed.
    left: u32,
    /// How many that one stands for, less one.
    skipped: u32,
    /// Exits between two that are timed, on the average; as the power of two.
    period: u32,
    /// When the last one was.
    last: u64,
    /// Only counted: what it takes is somebody else's.
    muted: bool,
}

impl Entry {
    /// Only counts from now on.
    pub const fn mute(&mut self) {
        self.muted = true;
    }

    /// Ticks that one takes on the average, if one was measured.
    #[must_use]
    pub fn average(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "an average")]
        let quotient = |a: u64, b: u64| a as f64 / b as f64;
        (self.weight > 0).then(|| quotient(self.ticks, self.weight))
    }

    /// Adds another vCPU's, or another life's.
    pub const fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.measured += other.measured;
        self.weight += other.weight;
        self.ticks += other.ticks;
    }

    /// Takes a measurement that stands for `weight` exits. What is far above the average is mostly an interruption by the host, which may be long and
    /// did not meet the exits that this one stands for: what is above [`FAR`] averages counts once only.
    const fn take(&mut self, ticks: u64, weight: u64) {
        let far = match self.ticks.checked_div(self.weight) {
            Some(average) if weight > 1 => FAR * (average + 1),
            _ => u64::MAX,
        };
        let common = if ticks < far { ticks } else { far };
        self.measured += 1;
        self.weight += weight;
        self.ticks += weight * common + (ticks - common);
    }

    /// Chooses how many exits go by until the next measurement; `now` is when this one began. What this one stands for.
    fn schedule(&mut self, now: u64, distance: u64, random: u32) -> u32 {
        let weight = self.skipped.saturating_add(1);
        let since = now.wrapping_sub(std::mem::replace(&mut self.last, now));
        if since < distance && self.period < MAX_PERIOD {
            self.period = (self.period * 2).max(2);
        } else if since > 4 * distance {
            self.period /= 2;
        }
        // From none to twice the period, the period on the average.
        self.skipped = if self.period > 1 { random % (2 * self.period - 1) } else { 0 };
        self.left = self.skipped;
        weight
    }
}

/// A span that began.
#[derive(Clone, Copy, Debug, Default)]
#[must_use = "a span that is not ended is not measured"]
pub struct Span {
    /// When; 0 if it is not timed.
    start: u64,
    /// How many exits it stands for; 0: it is timed only for those around it.
    weight: u32,
    /// What the spans beside it had taken from the one around it.
    beside: u64,
}

impl Span {
    /// One that is not timed.
    pub const NONE: Self = Self { start: 0, weight: 0, beside: 0 };

    /// Whether its end matters.
    #[must_use]
    pub const fn is_timed(&self) -> bool {
        self.start != 0
    }
}

/// Times the spans of one vCPU.
#[derive(Clone, Debug)]
pub struct Meter {
    calibration: Calibration,
    distance: u64,
    /// Timed spans that have begun and not ended.
    open: u32,
    /// What the spans inside of the innermost of them took.
    inside: u64,
    random: u32,
    on: bool,
    /// Spans that were timed.
    pub measurements: u64,
}

impl Default for Meter {
    /// One that never measures: of accounts that were added up.
    fn default() -> Self {
        Self { on: false, ..Self::with(Calibration { reading: 0, measurement: 0.0, event: 0.0 }) }
    }
}

impl Meter {
    /// A vCPU's. `TRELLIS_ACCOUNTING=off` in the environment has it count only, for comparisons.
    #[must_use]
    pub fn new() -> Self {
        let off = std::env::var_os("TRELLIS_ACCOUNTING").is_some_and(|v| v == "off");
        Self { on: !off, ..Self::with(Calibration::get()) }
    }

    fn with(calibration: Calibration) -> Self {
        let distance = calibration.distance();
        Self { calibration, distance, open: 0, inside: 0, random: 0x9e37_79b9, on: true, measurements: 0 }
    }

    /// An exit of this cause begins.
    #[inline(always)]
    pub fn begin(&mut self, entry: &mut Entry) -> Span {
        entry.count += 1;
        self.watch(entry)
    }

    /// The same without counting it: it is not certain yet that it is one.
    #[inline(always)]
    pub fn watch(&mut self, entry: &mut Entry) -> Span {
        let due = entry.left == 0;
        if !due {
            entry.left -= 1;
            if self.open == 0 {
                return Span::NONE;
            }
        }
        self.start(entry, due)
    }

    #[cold]
    #[inline(never)]
    fn start(&mut self, entry: &mut Entry, due: bool) -> Span {
        if entry.muted || !self.on {
            if self.open == 0 {
                entry.left = u32::MAX;
            }
            return Span::NONE;
        }
        // xorshift32 (Marsaglia 2003).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        let weight = if due { entry.schedule(rdtsc(), self.distance, self.random) } else { 0 };
        self.open += 1;
        let beside = std::mem::take(&mut self.inside);
        // Last of all, so that the span has next to nothing of this in it.
        Span { start: rdtsc(), weight, beside }
    }

    /// It ends: the guest goes on, or the span around it. Its cause may be known better than when it began.
    #[inline(always)]
    pub fn end(&mut self, entry: &mut Entry, span: Span) {
        if span.start != 0 {
            self.stop(entry, span);
        }
    }

    #[cold]
    #[inline(never)]
    fn stop(&mut self, entry: &mut Entry, span: Span) {
        let all = rdtsc().saturating_sub(span.start);
        self.measurements += 1;
        self.open = self.open.saturating_sub(1);
        let own = all.saturating_sub(self.inside + self.calibration.reading);
        // What it takes from the span around it has the cost of measuring it in it.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some hundred ticks")]
        let measurement = self.calibration.measurement as u64;
        self.inside = if self.open == 0 {
            0
        } else {
            span.beside + all + measurement.saturating_sub(self.calibration.reading)
        };
        if span.weight == 0 {
            return;
        }
        entry.take(own, u64::from(span.weight));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(distance: u64) -> Meter {
        Meter { distance, ..Meter::with(Calibration { reading: 0, measurement: 0.0, event: 0.0 }) }
    }

    fn wait(ticks: u64) {
        let from = rdtsc();
        while rdtsc() - from < ticks {}
    }

    #[test]
    fn rare_exits_are_all_measured_and_frequent_ones_sampled_and_all_counted() {
        let (mut rare, mut frequent) = (Entry::default(), Entry::default());
        let mut m = meter(0);
        for _ in 0..100 {
            let span = m.begin(&mut rare);
            wait(1000);
            m.end(&mut rare, span);
        }
        assert_eq!((rare.count, rare.measured), (100, 100));
        assert!(rare.average().unwrap() >= 1000.0, "{rare:?}");
        let mut m = meter(u64::MAX / 8);
        for _ in 0..100_000 {
            let span = m.begin(&mut frequent);
            m.end(&mut frequent, span);
        }
        assert_eq!(frequent.count, 100_000);
        assert!((5..100).contains(&frequent.measured), "{frequent:?}");
        assert!(frequent.weight <= frequent.count);
    }

    #[test]
    fn outer_span_has_only_what_the_inner_ones_leave() {
        let (mut outer, mut inner) = (Entry::default(), Entry::default());
        let mut m = meter(0);
        let from = rdtsc();
        for _ in 0..50 {
            let around = m.begin(&mut outer);
            for _ in 0..2 {
                let within = m.begin(&mut inner);
                wait(50_000);
                m.end(&mut inner, within);
            }
            m.end(&mut outer, around);
        }
        let passed = rdtsc() - from;
        assert!(inner.ticks >= 100 * 50_000 && inner.ticks + outer.ticks <= passed, "INV-ACC-1");
        // Without the waiting next to nothing, but for interruptions.
        assert!(outer.ticks < inner.ticks / 2, "{outer:?} {inner:?}");
        assert_eq!((m.open, m.inside, m.measurements), (0, 0, 150));
    }

    #[test]
    fn inner_span_is_timed_for_the_outer_one_and_keeps_its_own_sampling() {
        let (mut outer, mut inner) = (Entry::default(), Entry { left: 1000, ..Entry::default() });
        let mut m = meter(0);
        let around = m.begin(&mut outer);
        let within = m.begin(&mut inner);
        wait(1_000_000);
        m.end(&mut inner, within);
        m.end(&mut outer, around);
        assert_eq!((inner.count, inner.measured, inner.left), (1, 0, 999));
        assert!(outer.ticks < 1_000_000, "{outer:?}");
    }

    #[test]
    fn muted_and_switched_off_only_count() {
        let mut muted = Entry::default();
        muted.mute();
        let mut m = meter(0);
        let mut off = Meter { on: false, ..meter(0) };
        let mut plain = Entry::default();
        for _ in 0..10 {
            let span = m.begin(&mut muted);
            m.end(&mut muted, span);
            let span = off.begin(&mut plain);
            off.end(&mut plain, span);
        }
        assert_eq!((muted.count, muted.measured, plain.count, plain.measured), (10, 0, 10, 0));
        assert_eq!(plain.average(), None);
    }

    #[test]
    fn interrupted_sample_counts_once_beyond_what_is_far() {
        let mut e = Entry::default();
        (0..10).for_each(|_| e.take(99, 1));
        e.take(1_000_000, 50);
        assert_eq!((e.weight, e.measured), (60, 11));
        assert_eq!(e.ticks, 990 + 50 * 3200 + (1_000_000 - 3200));
        // Where each is measured, each counts.
        e.take(5_000_000, 1);
        assert_eq!(e.ticks, 990 + 50 * 3200 + (1_000_000 - 3200) + 5_000_000);
    }

    #[test]
    fn calibration_is_of_this_world() {
        let c = Calibration::get();
        assert!(c.measurement > 0.0 && c.event >= 0.0 && c.event < c.measurement, "{c:?}");
    }
}

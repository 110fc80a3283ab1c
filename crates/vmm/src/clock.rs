//! Guest time. There is one counter, the guest's TSC; nanoseconds and wall-clock time are functions of it, so that no two
//! clocks of the guest can drift apart.
//!
//! - [`ClockMode::Host`]: the host's TSC minus an offset. It counts from 0 at power-on and stands still while the machine
//!   is stopped (saved, paused).
//! - [`ClockMode::Icount`]: 1 GHz, moved on by the vCPU's thread alone ([`GuestClock::advance`]).
//!
//! The host's TSC is measured against its monotonic clock at start ([`HostCounter::get`]): both ends of the interval are
//! read as the best of many tries, which leaves an error of about 100 ns in 50 ms, 2 ppm. Where the host's TSC is not
//! constant, the monotonic clock itself is the counter.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use devices::clock::{Clock, Ns};
use serde::{Deserialize, Serialize};
use x86_interp::host_tsc::rdtsc;

use crate::config::ClockMode;

const NS_PER_S: u64 = 1_000_000_000;
/// Wall-clock time at power-on with `icount`: 2024-01-01 00:00 UTC.
const ICOUNT_EPOCH_NS: u64 = 1_704_067_200 * NS_PER_S;
/// How long the host's TSC is measured.
const CALIBRATION: Duration = Duration::from_millis(50);

/// A constant-rate counter of the host.
#[derive(Clone, Copy, Debug)]
pub enum HostCounter {
    /// The TSC.
    Tsc {
        /// Its frequency.
        hz: u64,
    },
    /// The monotonic clock in nanoseconds since this moment.
    Monotonic {
        /// Its zero.
        start: Instant,
    },
}

/// TSC and monotonic clock at the same moment, as well as that can be had.
fn paired_reading() -> (u64, Instant) {
    let mut best = (u64::MAX, 0, Instant::now());
    for _ in 0..64 {
        let before = rdtsc();
        let now = Instant::now();
        let after = rdtsc();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), now);
        }
    }
    (best.1, best.2)
}

fn first_reading() -> (u64, Instant) {
    static FIRST: OnceLock<(u64, Instant)> = OnceLock::new();
    *FIRST.get_or_init(paired_reading)
}

/// Ticks of the host's TSC in a second, by all the time since the program began; waits where that is too short to tell.
pub fn host_tsc_hz() -> f64 {
    let (tsc, start) = first_reading();
    std::thread::sleep(CALIBRATION.saturating_sub(start.elapsed()));
    let (now, end) = paired_reading();
    #[expect(clippy::cast_precision_loss, reason = "a frequency for people")]
    let ticks = now.wrapping_sub(tsc) as f64;
    ticks / end.duration_since(start).as_secs_f64()
}

/// Whether the host's TSC counts at a constant rate: CPUID says so (SDM 3B 18.17.1), or the host's kernel relies on it.
fn tsc_is_constant() -> bool {
    use std::arch::x86_64::__cpuid;
    let invariant = __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx >> 8 & 1 != 0;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    invariant || std::fs::read_to_string(source).is_ok_and(|s| s.trim() == "tsc")
}

impl HostCounter {
    /// Begins the measurement. To be called early: [`HostCounter::get`] waits for what is left of it.
    pub fn prepare() {
        first_reading();
    }

    /// This host's counter, measured once in the life of the process.
    #[must_use]
    pub fn get() -> Self {
        static COUNTER: OnceLock<HostCounter> = OnceLock::new();
        *COUNTER.get_or_init(|| {
            let (tsc, start) = first_reading();
            if !tsc_is_constant() {
                tracing::info!("the host's TSC is not constant; guest time comes from the monotonic clock");
                return Self::Monotonic { start };
            }
            std::thread::sleep(CALIBRATION.saturating_sub(start.elapsed()));
            let (tsc_end, end) = paired_reading();
            let ns = end.duration_since(start).as_nanos().max(1);
            let hz = u128::from(tsc_end.wrapping_sub(tsc)) * u128::from(NS_PER_S) / ns;
            Self::Tsc { hz: u64::try_from(hz).unwrap_or(NS_PER_S).max(1_000_000) }
        })
    }

    /// Ticks now.
    #[inline(always)]
    fn read(self) -> u64 {
        match self {
            Self::Tsc { .. } => rdtsc(),
            Self::Monotonic { start } => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Ticks per second.
    #[must_use]
    pub const fn hz(self) -> u64 {
        match self {
            Self::Tsc { hz } => hz,
            Self::Monotonic { .. } => NS_PER_S,
        }
    }
}

/// What a snapshot holds of the clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClockState {
    /// Mode.
    pub mode: ClockMode,
    /// Frequency of the guest's TSC in Hz; it stays what it was on a host with another frequency.
    pub tsc_hz: u64,
    /// The guest's TSC.
    pub tsc: u64,
    /// UTC at guest time 0, in ns since 1970. With the host's clock it is set anew when the clock starts.
    pub wall_base_ns: u64,
}

/// The machine's clock.
pub struct GuestClock {
    mode: ClockMode,
    host: HostCounter,
    tsc_hz: u64,
    /// `(10^9 << SHIFT) / tsc_hz`: nanoseconds per tick.
    ns_per_tick: u128,
    running: AtomicBool,
    /// The TSC while the clock stands.
    held: AtomicU64,
    /// Scaled host ticks at guest TSC 0, while the clock runs.
    base: AtomicU64,
    wall_base_ns: AtomicU64,
}

/// Fraction bits of [`GuestClock::ns_per_tick`].
const SHIFT: u32 = 60;

impl GuestClock {
    /// A clock at 0 that stands. `wall_base_ns` is UTC at power-on (`icount` only; `None` is its fixed epoch).
    #[must_use]
    pub fn new(mode: ClockMode, wall_base_ns: Option<u64>) -> Self {
        let tsc_hz = match mode {
            ClockMode::Host => HostCounter::get().hz(),
            ClockMode::Icount => NS_PER_S,
        };
        let wall_base_ns = match mode {
            ClockMode::Host => utc_ns(),
            ClockMode::Icount => wall_base_ns.unwrap_or(ICOUNT_EPOCH_NS),
        };
        Self::restore(&ClockState { mode, tsc_hz, tsc: 0, wall_base_ns })
    }

    /// A clock that stands where a saved one stood.
    #[must_use]
    pub fn restore(state: &ClockState) -> Self {
        let tsc_hz = state.tsc_hz.max(1_000_000);
        Self {
            mode: state.mode,
            host: match state.mode {
                ClockMode::Host => HostCounter::get(),
                // Never read.
                ClockMode::Icount => HostCounter::Tsc { hz: NS_PER_S },
            },
            tsc_hz,
            ns_per_tick: (u128::from(NS_PER_S) << SHIFT) / u128::from(tsc_hz),
            running: AtomicBool::new(false),
            held: AtomicU64::new(state.tsc),
            base: AtomicU64::new(0),
            wall_base_ns: AtomicU64::new(state.wall_base_ns),
        }
    }

    /// The state now; exact when the clock stands.
    #[must_use]
    pub fn state(&self) -> ClockState {
        ClockState {
            mode: self.mode,
            tsc_hz: self.tsc_hz,
            tsc: self.tsc(),
            wall_base_ns: self.wall_base_ns.load(Ordering::Relaxed),
        }
    }

    /// Mode.
    #[must_use]
    pub const fn mode(&self) -> ClockMode {
        self.mode
    }

    /// Lets time pass (with the host's clock). Wall-clock time catches up with the host's.
    pub fn start(&self) {
        if self.mode == ClockMode::Host && !self.running.load(Ordering::SeqCst) {
            let held = self.held.load(Ordering::SeqCst);
            self.wall_base_ns.store(utc_ns().saturating_sub(self.now().0), Ordering::SeqCst);
            self.base.store(self.host_ticks().wrapping_sub(held), Ordering::SeqCst);
            self.running.store(true, Ordering::SeqCst);
        }
    }

    /// Stops time. Nobody may read the clock meanwhile who could not bear a small step back.
    pub fn stop(&self) {
        if self.running.load(Ordering::SeqCst) {
            self.held.store(self.tsc(), Ordering::SeqCst);
            self.running.store(false, Ordering::SeqCst);
        }
    }

    /// `icount`: `ns` instructions or idle nanoseconds have passed.
    pub fn advance(&self, ns: u64) {
        debug_assert_eq!(self.mode, ClockMode::Icount);
        self.held.fetch_add(ns, Ordering::SeqCst);
    }

    /// Host ticks, scaled to the guest's frequency.
    #[inline(always)]
    fn host_ticks(&self) -> u64 {
        let ticks = self.host.read();
        if self.host.hz() == self.tsc_hz { ticks } else { self.scaled(ticks) }
    }

    #[cold]
    #[expect(clippy::cast_possible_truncation, reason = "a counter, wraps after centuries")]
    fn scaled(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * u128::from(self.tsc_hz) / u128::from(self.host.hz())) as u64
    }
}

impl Clock for GuestClock {
    #[expect(clippy::cast_possible_truncation, reason = "wraps after centuries")]
    fn now(&self) -> Ns {
        // Below the exact value by less than 2^-59 of it, so never beyond a deadline from `tsc_deadline`.
        Ns((u128::from(self.tsc()).wrapping_mul(self.ns_per_tick) >> SHIFT) as u64)
    }

    fn wall_ns(&self) -> u64 {
        self.wall_base_ns.load(Ordering::Relaxed).wrapping_add(self.now().0)
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    #[inline]
    fn tsc(&self) -> u64 {
        if self.running.load(Ordering::Relaxed) {
            self.host_ticks().wrapping_sub(self.base.load(Ordering::Relaxed))
        } else {
            self.held.load(Ordering::SeqCst)
        }
    }

    fn tsc_delta(&self) -> Option<u64> {
        let plain = matches!(self.host, HostCounter::Tsc { hz } if hz == self.tsc_hz);
        let running = self.mode == ClockMode::Host && self.running.load(Ordering::Relaxed);
        (plain && running).then(|| self.base.load(Ordering::Relaxed).wrapping_neg())
    }

    fn tsc_deadline(&self, tsc: u64) -> Ns {
        Ns::from_ticks(tsc, self.tsc_hz)
    }
}

/// UTC now, in ns since 1970.
fn utc_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_clock_keeps_to_the_hosts_within_a_thousandth() {
        let clock = GuestClock::new(ClockMode::Host, None);
        clock.start();
        let (from, start) = (clock.now().0, Instant::now());
        std::thread::sleep(Duration::from_millis(200));
        let (guest, host) = (u128::from(clock.now().0 - from), start.elapsed().as_nanos());
        // A preempted reading in between is the test's fault, not the clock's: 0.1 % and 2 ms.
        assert!(guest.abs_diff(host) < host / 1000 + 2_000_000, "{guest} {host}");
    }

    #[test]
    fn stopped_clock_stands_and_goes_on_where_it_stood() {
        let clock = GuestClock::new(ClockMode::Host, None);
        clock.start();
        std::thread::sleep(Duration::from_millis(2));
        clock.stop();
        let at = clock.tsc();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(clock.tsc(), at);
        let restored = GuestClock::restore(&clock.state());
        restored.start();
        assert!(restored.tsc() >= at && restored.now().0 < 15_000_000);
    }

    #[test]
    fn frequency_of_another_host_is_kept() {
        let mut state = GuestClock::new(ClockMode::Host, None).state();
        state.tsc_hz = 1_234_567_890;
        let clock = GuestClock::restore(&state);
        clock.start();
        let (begin, from) = (std::time::Instant::now(), clock.tsc());
        std::thread::sleep(Duration::from_millis(50));
        let ticks = clock.tsc() - from;
        // A busy host may sleep longer, but no longer than this.
        let longest = begin.elapsed().as_nanos() * 1_250_000_000 / 1_000_000_000;
        assert!((61_000_000..longest).contains(&u128::from(ticks)), "{ticks}, at most {longest}");
    }

    #[test]
    fn deadline_is_never_early() {
        let mut state = GuestClock::new(ClockMode::Icount, None).state();
        for hz in [1_000_000_000, 2_794_748_123, 3_579_545] {
            state.tsc_hz = hz;
            for tsc in [1, 999, 1 << 32, 86_400 * hz * 30, 1 << 50] {
                let at = |tsc| GuestClock::restore(&ClockState { tsc, ..state });
                let deadline = at(0).tsc_deadline(tsc);
                assert!(at(tsc - 1).now() < deadline, "{hz} {tsc}");
                assert!(at(tsc + 2).now() >= deadline || hz > 1_000_000_000, "{hz} {tsc}");
            }
        }
    }

    #[test]
    fn icount_moves_only_when_told() {
        let clock = GuestClock::new(ClockMode::Icount, None);
        clock.start();
        assert_eq!(clock.now(), Ns(0));
        clock.advance(1234);
        assert_eq!((clock.tsc(), clock.now()), (1234, Ns(1234)));
        assert_eq!(clock.wall_ns(), ICOUNT_EPOCH_NS + 1234);
    }
}

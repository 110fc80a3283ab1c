//! What the host is, for the report.

use std::time::{Duration, Instant};

use serde::Serialize;
use x86_interp::host_tsc::rdtsc;

/// The host.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// As `/proc/cpuinfo` names it.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Release of the running kernel.
    pub kernel: String,
    /// Whether the host is itself a guest, by the CPU's own word.
    pub is_virtual: bool,
    /// Frequency of the time-stamp counter: what a cycle is.
    pub tsc_hz: f64,
    /// Processes that wanted to run in the last minute, at the end of the run: much above 1, and times are doubtful.
    pub load_average: f64,
}

impl Host {
    /// This host, now.
    #[must_use]
    pub fn now() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            tsc_hz: tsc_hz(),
            is_virtual: field(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            load_average: load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// Ticks of the counter by the clock, over some 20 ms.
fn tsc_hz() -> f64 {
    let (start, first) = (Instant::now(), rdtsc());
    std::thread::sleep(Duration::from_millis(20));
    let (elapsed, ticks) = (start.elapsed(), rdtsc().wrapping_sub(first));
    ticks as f64 / elapsed.as_secs_f64()
}

/// The first value of a key in `/proc/cpuinfo`.
fn field<'a>(cpuinfo: &'a str, key: &str) -> Option<&'a str> {
    let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    lines.into_iter().find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_is_the_first_of_its_name() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2: fast\n\nmodel name\t: B\n";
        assert_eq!(field(text, "model name"), Some("A CPU @ 2: fast"));
        assert_eq!(field(text, "flags"), None);
    }
}

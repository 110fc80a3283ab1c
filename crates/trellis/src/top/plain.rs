//! A frame as text.

use std::fmt::Write as _;

use super::rates::{Frame, Machine};

/// Causes that are shown of each machine.
const CAUSES: usize = 12;

/// What is said when there is nothing to be seen.
pub const NONE: &str = "no machine is running; start one with: trellis boot";

/// So long, as in `1:02:05`.
pub fn duration(seconds: u64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// All of it.
pub fn text(frame: &Frame) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write(frame, &mut out);
    out
}

fn write(frame: &Frame, out: &mut String) -> std::fmt::Result {
    for name in &frame.ended {
        writeln!(out, "the machine '{name}' has ended")?;
    }
    if frame.machines.is_empty() {
        return writeln!(out, "{NONE}");
    }
    let width = frame.machines.iter().map(|m| m.info.name.len()).max().unwrap_or(0).max(4);
    writeln!(
        out,
        "{:width$}  {:6}  {:>4}  {:>8}  {:>7}  {:>8}  {:>10}  {:>15}  GUEST",
        "NAME", "ENGINE", "CPUS", "UP", "LOAD", "IN GUEST", "EXITS/s", "MEMORY MiB"
    )?;
    for m in &frame.machines {
        if let Some(error) = &m.error {
            writeln!(out, "{:width$}  {error}", m.info.name)?;
            continue;
        }
        let memory = format!("{} of {}", m.resident_bytes >> 20, m.info.memory_bytes >> 20);
        writeln!(
            out,
            "{:width$}  {:6}  {:>4}  {:>8}  {:>5.0} %  {:>6.1} %  {:>10.0}  {memory:>15}  {}{}",
            m.info.name,
            m.info.engine,
            m.info.cpus,
            duration(m.info.seconds),
            m.load,
            m.guest,
            m.exits,
            m.info.guest,
            if m.info.paused { " (paused)" } else { "" },
        )?;
    }
    frame.machines.iter().filter(|m| m.error.is_none()).try_for_each(|m| causes(m, out))
}

fn causes(m: &Machine, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\n{}: exits by cause", m.info.name)?;
    if m.cpus.len() > 1 {
        let cpus: Vec<_> =
            m.cpus.iter().enumerate().map(|(n, c)| format!("vcpu{n} {:.0} %", c.load)).collect();
        writeln!(out, "  load: {}", cpus.join(", "))?;
    }
    writeln!(out, "  {:<36}{:>12}{:>14}{:>9}", "CAUSE", "PER SECOND", "CYCLES EACH", "SHARE")?;
    for cause in m.causes.iter().take(CAUSES) {
        let cycles = cause.cycles.map_or_else(String::new, |cycles| format!("{cycles:.0}"));
        let share = cause.share.map_or_else(String::new, |share| format!("{share:.1} %"));
        writeln!(out, "  {:<36}{:>12.0}{cycles:>14}{share:>9}", cause.name, cause.rate)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::rates::{Cause, Machine, samples};
    use super::*;

    #[test]
    fn frame_has_the_machine_its_causes_and_who_has_ended() {
        let cause = |name: &str, cycles| Cause {
            name: name.into(),
            rate: 1000.0,
            cycles,
            share: cycles.map(|_| 20.0),
        };
        let m = Machine {
            info: samples::info("web"),
            load: 50.0,
            guest: 75.0,
            exits: 6000.0,
            causes: vec![cause("callout CPUID", Some(1e5)), cause("assembly TLB refills", None)],
            ..Machine::default()
        };
        let text = text(&Frame { machines: vec![m], ended: vec!["db".into()] });
        let words: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(words[0].join(" "), "the machine 'db' has ended");
        assert_eq!(words[2][..7], ["web", "bt", "1", "1:02:05", "50", "%", "75.0"]);
        assert!(words.contains(&vec!["callout", "CPUID", "1000", "100000", "20.0", "%"]), "{text}");
        assert!(words.contains(&vec!["assembly", "TLB", "refills", "1000"]), "{text}");
    }

    #[test]
    fn nothing_runs_and_it_is_said_how_to_change_that() {
        assert_eq!(text(&Frame::default()), format!("{NONE}\n"));
    }
}

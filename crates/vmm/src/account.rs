//! Where the time went, as it is shown: a table for people, JSON for programs. What is measured, and how, is in `engine::account`.

use std::fmt;

use engine::cost::{Basis, Row, Table};
use serde_json::{Value, json};

use crate::stats::{Stats, VcpuStats};

/// Rows that the table shows; JSON has all.
const ROWS: usize = 40;

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "ticks of years fit; none is negative"
)]
const fn whole(ticks: f64) -> u64 {
    ticks as u64
}

/// Writes the table.
pub(crate) fn table(stats: &Stats, hz: f64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let all = stats.together();
    let table = all.account(hz);
    writeln!(f, "exits by cause{:>37}{:>14}{:>12}{:>8}", "count", "cycles each", "total", "share")?;
    let show = |ticks: f64| {
        let share = table.percent(ticks).map_or_else(String::new, |p| format!("{p:.1} %"));
        format!("{:>10.3} s{share:>8}", ticks / hz)
    };
    for row in table.rows.iter().take(ROWS) {
        let name = format!("{} {}", row.kind, row.cause);
        let each = row.average().map_or_else(String::new, |each| format!("{}{each:.0}", mark(row.basis())));
        let total = row.total().map_or_else(String::new, show);
        writeln!(f, "  {:<36}{:>13}{each:>14}{total:>20}", shorten(&name), row.count)?;
    }
    if let Some(others) = table.rows.get(ROWS..).filter(|others| !others.is_empty()) {
        let total: f64 = others.iter().filter_map(Row::total).sum();
        let (name, count) = (format!("{} others", others.len()), others.iter().map(|r| r.count).sum::<u64>());
        writeln!(f, "  {name:<36}{count:>13}{:>14}{:>20}", "", show(total))?;
    }
    writeln!(f, "  {:<36}{:>13}{:>14}{:>20}", "the guest, which is the rest", "", "", show(table.guest()))?;
    if table.waiting > 0.01 * table.busy {
        writeln!(
            f,
            "  {:<36}{:>13}{:>14}{:>20}",
            "waiting for a CPU of the host",
            "",
            "",
            show(table.waiting)
        )?;
    }
    writeln!(
        f,
        "  ~ sampled, = measured by itself, no cycles: counted only, in the guest's time; {} cycles are 1 µs",
        whole(hz / 1e6)
    )?;
    writeln!(f, "accounting itself{:>67}", show(table.overhead()))?;
    if stats.vcpus.len() > 1 {
        stats.vcpus.iter().enumerate().try_for_each(|(index, v)| vcpu(index, v, hz, f))?;
    }
    Ok(())
}

/// One vCPU's line.
fn vcpu(index: usize, v: &VcpuStats, hz: f64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let table = v.account(hz);
    let percent = |ticks| table.percent(ticks).unwrap_or(0.0);
    let greatest: Vec<_> = table.rows.iter().take(3).filter(|r| r.total().is_some()).collect();
    let greatest: Vec<_> = greatest
        .iter()
        .map(|r| format!("{} {} {:.1} %", r.kind, r.cause, percent(r.total().unwrap_or(0.0))))
        .collect();
    writeln!(
        f,
        "  vcpu{index}: not asleep {:.3} s, of that the guest {:.1} %, {}",
        v.busy.as_secs_f64(),
        percent(table.guest()),
        greatest.join(", ")
    )
}

/// How a cost is known, in a sign.
const fn mark(basis: Basis) -> &'static str {
    match basis {
        Basis::Sampled => "~",
        Basis::Calibrated => "=",
        Basis::Measured | Basis::Counted => "",
    }
}

fn shorten(name: &str) -> String {
    if name.chars().count() <= 36 { name.to_owned() } else { name.chars().take(35).chain(['…']).collect() }
}

/// For programs. `tsc_hz` is the unit of everything called cycles.
pub(crate) fn to_json(v: &VcpuStats, hz: f64) -> Value {
    let table = v.account(hz);
    let rows: Vec<_> = table.rows.iter().map(|r| row_json(r, &table)).collect();
    let overhead = table.overhead();
    let costs = engine::account::Calibration::get();
    json!({
        "tsc_hz": whole(hz),
        "busy_cycles": whole(table.busy),
        "asleep_seconds": v.asleep.as_secs_f64(),
        "cpu_seconds": v.cpu.as_secs_f64(),
        "waiting_cycles": whole(table.waiting),
        "guest_cycles": whole(table.guest()),
        "exits": rows,
        "overhead": {
            "events": table.events,
            "measurements": table.measurements,
            "event_cycles": costs.event,
            "measurement_cycles": costs.measurement,
            "percent": table.percent(overhead),
        },
    })
}

fn row_json(row: &Row, table: &Table) -> Value {
    json!({
        "kind": row.kind,
        "cause": row.cause,
        "count": row.count,
        "measured": row.measured,
        "basis": row.basis().name(),
        "total_cycles": row.total().map(whole),
        "average_cycles": row.average(),
        "share_percent": row.total().and_then(|ticks| table.percent(ticks)),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use engine::report::Report;

    use super::*;

    fn stats() -> Stats {
        let mut v = VcpuStats { busy: Duration::from_secs(1), ..VcpuStats::default() };
        let costs = vec![
            Row::calibrated("switch", "enter and leave", 1000, 100_000.0),
            Row::calibrated("callout", "CPUID", 10, 20_000_000.0),
            Row::counted("assembly", "TLB refills", 7),
        ];
        v.engine = Report { costs, ..Report::default() };
        Stats { elapsed: Duration::from_secs(1), vcpus: vec![v.clone(), v], ..Stats::default() }
    }

    struct Shown(Stats);

    impl fmt::Display for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            table(&self.0, 1e9, f)
        }
    }

    #[test]
    fn table_is_sorted_by_cost_and_ends_with_the_guests_share() {
        let text = Shown(stats()).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["callout", "CPUID", "20", "=20000000", "0.400", "s", "20.0", "%"]);
        assert_eq!(lines[2][4..], ["2000", "=100000", "0.200", "s", "10.0", "%"]);
        assert_eq!(lines[3], ["assembly", "TLB", "refills", "14"]);
        assert_eq!(lines[4][6..], ["1.400", "s", "70.0", "%"]);
        assert!(
            text.contains("vcpu1: not asleep 1.000 s, of that the guest 70.0 %, callout CPUID 20.0 %"),
            "{text}"
        );
        assert!(text.contains("accounting itself"));
    }

    #[test]
    fn json_has_sums_that_add_up_and_null_for_what_is_only_counted() {
        let json = to_json(&stats().together(), 1e9);
        let exits = json["exits"].as_array().unwrap();
        let sum: u64 = exits.iter().filter_map(|e| e["total_cycles"].as_u64()).sum();
        assert_eq!(sum + json["guest_cycles"].as_u64().unwrap(), json["busy_cycles"].as_u64().unwrap());
        assert_eq!(exits[0]["cause"], "CPUID");
        assert_eq!(exits[0]["basis"], "calibrated");
        assert!(exits[2]["total_cycles"].is_null() && exits[2]["count"] == 14);
        assert!(json["overhead"]["percent"].is_number());
    }
}

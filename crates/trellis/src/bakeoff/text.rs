//! The result as text.

use super::account::Row;
use super::explain::{Basis, Explanation, Part};
use super::report::{Bakeoff, ModeResult};
use crate::bench::table::{align, duration, percent};
use crate::model::table;

/// Rows shown of each part.
const ROWS: usize = 5;
/// A row that takes less of the time is not shown.
const LEAST: f64 = 0.002;

/// Seconds with a fitting unit.
#[must_use]
pub fn time(seconds: f64) -> String {
    if seconds < 0.0 { format!("-{}", duration(-seconds * 1e9)) } else { duration(seconds * 1e9) }
}

/// All of it.
#[must_use]
pub fn render(bakeoff: &Bakeoff) -> String {
    let mut text = format!("{}\n\n{}", bakeoff.workload, align(&modes(bakeoff)));
    for mode in &bakeoff.modes {
        if let Some(explanation) = &mode.explanation {
            text.push_str(&format!("\n{}", explained(mode, explanation)));
        }
    }
    if let Some(predicted) = &bakeoff.predicted {
        text.push('\n');
        text.push_str(&table::render(std::slice::from_ref(predicted)));
    }
    if !bakeoff.advice.is_empty() {
        text.push_str("\nAdvice:\n");
        bakeoff.advice.iter().for_each(|line| text.push_str(&format!("  {line}\n")));
    }
    if !bakeoff.notes.is_empty() {
        text.push('\n');
        bakeoff.notes.iter().for_each(|line| text.push_str(&format!("{line}\n")));
    }
    text
}

/// The modes side by side.
fn modes(bakeoff: &Bakeoff) -> Vec<Vec<String>> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let mut lines = vec![words(&[
        "mode",
        "",
        "median",
        "spread",
        "of native",
        "first run",
        "boot",
        "unexplained",
        "by prediction",
    ])];
    for mode in &bakeoff.modes {
        let value = match (mode.seconds, &mode.error) {
            (_, Some(error)) if error.starts_with("no answer within") => "timed out".to_owned(),
            (_, Some(_)) => "failed".to_owned(),
            (Some(seconds), None) => time(seconds),
            (None, None) => "-".to_owned(),
        };
        let of = |number: Option<f64>, shown: fn(f64) -> String| number.map_or_else(String::new, shown);
        lines.push(vec![
            mode.name.to_owned(),
            String::new(),
            value,
            of(mode.spread, |spread| format!("{spread:.0} %")),
            of(mode.percent_of_native.filter(|_| mode.name != "native"), percent),
            of(mode.times.first().copied().filter(|_| mode.times.len() > 1), time),
            of(mode.boot_seconds, time),
            mode.explanation
                .as_ref()
                .map_or_else(String::new, |e| format!("{:+.1} %", e.unexplained_percent())),
        ]);
    }
    lines
}

/// Where a mode's time went.
fn explained(mode: &ModeResult, explanation: &Explanation) -> String {
    let runs = if mode.times.len() > 1 { format!(" of {} runs", mode.times.len()) } else { String::new() };
    let mut lines = vec![vec![
        format!("{}: where {}{runs} went", mode.name, time(explanation.seconds)),
        String::new(),
        "time".to_owned(),
        "share".to_owned(),
        "count".to_owned(),
        "each".to_owned(),
    ]];
    let share =
        |seconds: f64| format!("{:.1} %", seconds / explanation.seconds.max(f64::MIN_POSITIVE) * 100.0);
    for part in &explanation.parts {
        lines.push(part_line(part, share(part.seconds)));
        let shown =
            part.rows.iter().filter(|row| row.seconds.is_some_and(|s| s >= explanation.seconds * LEAST));
        lines.extend(shown.take(ROWS).map(|row| row_line(row, &share)));
    }
    let rest = explanation.unexplained;
    lines.push(vec!["unexplained".to_owned(), String::new(), time(rest), share(rest)]);
    let mut text = align(&lines);
    for line in about_code(explanation) {
        text.push_str(&format!("  {line}\n"));
    }
    if !mode.functions.is_empty() {
        text.push_str("  dearest guest functions, of samples in guest code:\n");
        for function in &mode.functions {
            let kind = if function.kernel { "kernel" } else { "user" };
            text.push_str(&format!(
                "    {:5.1} %  {kind:6}  {} (hottest at {:#x})\n",
                function.percent, function.name, function.hottest
            ));
        }
    }
    text
}

fn part_line(part: &Part, share: String) -> Vec<String> {
    let basis = match part.basis {
        Basis::Measured => "",
        Basis::Sampled => "sampled",
    };
    let each = part.count.filter(|count| *count > 0.0).map(|count| time(part.seconds / count));
    let count = part.count.map_or_else(String::new, |count| format!("{count:.0}"));
    vec![part.what.clone(), basis.to_owned(), time(part.seconds), share, count, each.unwrap_or_default()]
}

fn row_line(row: &Row, share: &impl Fn(f64) -> String) -> Vec<String> {
    let seconds = row.seconds.unwrap_or(0.0);
    vec![
        format!("    {}", row.cause),
        String::new(),
        time(seconds),
        share(seconds),
        if row.count > 0.0 { format!("{:.0}", row.count) } else { String::new() },
        if row.count > 0.0 { time(seconds / row.count) } else { String::new() },
    ]
}

/// What samples and fragments say of translated code.
fn about_code(explanation: &Explanation) -> Vec<String> {
    let mut lines = Vec::new();
    let lengthening = &explanation.lengthening;
    if let (Some(sampled), Some(factor)) = (explanation.sampled, lengthening.by_samples) {
        lines.push(format!(
            "translated code took {}; path lengthening {factor:.2} by samples{}",
            time(sampled),
            lengthening.by_instructions.map_or_else(String::new, |f| format!(", {f:.2} by instructions")),
        ));
        if let Some(predicted) = &explanation.predicted {
            lines.push(format!(
                "predicted: native {} × {factor:.2} = {}; with that {:+.1} % of the time are unexplained",
                time(predicted.native),
                time(predicted.seconds),
                explanation.predicted_percent().unwrap_or(0.0)
            ));
        }
    }
    lines
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::account::{Account, tests as samples};
    use super::super::explain::explain;
    use super::*;
    use crate::bakeoff::hot::{Names, functions};

    /// Native, bt with an explanation, a mode that failed and one that is not there.
    pub fn example() -> Bakeoff {
        let account = Account::between(&samples::before(), &samples::after());
        let mut bt = ModeResult::of_times("bt", &[0.5, 0.3, 0.3], Some(0.1));
        bt.explanation = Some(explain(1.1, &account, Some(0.25)));
        bt.functions = functions(&account.profile.as_ref().unwrap().sites, &Names::default(), 5);
        bt.profile = account.profile;
        let failed = ModeResult {
            error: Some("no answer within 5 s".into()),
            ..ModeResult::of_times("interp", &[], None)
        };
        let absent = ModeResult {
            skipped: Some("QEMU is not installed".into()),
            ..ModeResult::of_times("tcg", &[], None)
        };
        Bakeoff {
            workload: "gzip -k <file>".to_owned(),
            modes: vec![ModeResult::of_times("native", &[0.1, 0.1, 0.1], Some(0.1)), bt, failed, absent],
            notes: vec!["tcg is left out: QEMU is not installed".to_owned()],
            advice: vec!["Take bt.".to_owned()],
            ..Bakeoff::default()
        }
    }

    #[test]
    fn text_has_modes_explanation_remainder_and_advice() {
        let text = render(&example());
        for wanted in [
            "timed out",
            "33 %",
            "bt: where 1.10 s of 3 runs went",
            "the guest's own instructions",
            "    checks of accesses",
            "predicted: native 250 ms × 2.18 = 545 ms",
            "    CPUID",
            "unexplained",
            "2.18 by samples, 2.50 by instructions",
            "user    program, 0x401000",
            "Advice:\n  Take bt.",
            "tcg is left out",
        ] {
            assert!(text.contains(wanted), "{wanted}\n{text}");
        }
        assert!(!text.contains("TLB refill"), "it is only counted");
    }

    #[test]
    fn negative_remainders_are_shown() {
        assert_eq!(time(-0.5), "-500 ms");
    }
}

//! The result as a page for a browser: one file, nothing loaded from anywhere, light and dark by the reader's own choice.

pub mod bars;
pub mod curves;
pub mod svg;

use std::fmt::Write as _;

use super::catalog::{CHASE, NANO, PageSize};
use super::mode::REFERENCE;
use super::report::{ModeRow, Report, Row};
use super::table::{percent, value};
use bars::Form;
use curves::What;
use svg::escape;

/// The style of pages.
pub const STYLE: &str = include_str!("page.css");

/// The class that gives a mode its colour.
#[must_use]
pub fn class(mode: &str) -> &'static str {
    match mode {
        "interp" => "m-interp",
        "bt" => "m-bt",
        "kvm" => "m-kvm",
        "tcg" => "m-tcg",
        "qemu-kvm" => "m-qemu-kvm",
        _ => "m-native",
    }
}

/// The whole page.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>trellis bench</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
    );
    let parts = [
        head(report),
        programs(report),
        chase(report),
        operations(report),
        comparison(report),
        predictions(report),
        table(report),
        facts(report),
    ];
    parts.iter().for_each(|part| text.push_str(part));
    text.push_str("</body>\n</html>\n");
    text
}

/// What the cost model says, if it was asked.
fn predictions(report: &Report) -> String {
    match crate::model::table::render(&report.predictions) {
        text if text.is_empty() => text,
        text => format!("<h2>Prediction</h2>\n<div class=\"scroll\"><pre>{}</pre></div>\n", escape(&text)),
    }
}

/// The modes that were measured.
fn measured(report: &Report) -> impl Iterator<Item = &ModeRow> {
    report.modes.iter().filter(|mode| mode.skipped.is_none())
}

fn head(report: &Report) -> String {
    let host = &report.host;
    let mut text = format!(
        "<h1>trellis bench</h1>\n<p class=\"faint\">{}{}, Linux {}, trellis {}{}</p>\n<div class=\"cards\">\n",
        escape(&host.cpu),
        if host.is_virtual { " (itself virtual)" } else { "" },
        escape(&host.kernel),
        escape(report.trellis),
        if report.settings.quick { ", --quick" } else { "" }
    );
    for mode in measured(report).filter(|mode| mode.name != REFERENCE) {
        let Some(mean) = mode.percent_of_native else { continue };
        let real = mode.real_programs_percent_of_native;
        let real = real
            .map_or_else(String::new, |real| format!("<span>{} over real programs</span>", percent(real)));
        let _ = writeln!(
            text,
            "<div class=\"card {}\"><span>{}</span><b>{}</b><span>of native, geometric mean</span>{real}</div>",
            class(mode.name),
            escape(mode.about),
            percent(mean)
        );
    }
    text + "</div>\n"
}

fn legend(modes: &[&str]) -> String {
    let entries =
        modes.iter().map(|mode| format!("<span class=\"{}\"><i></i>{}</span>", class(mode), escape(mode)));
    format!("<div class=\"legend\">{}</div>\n", entries.collect::<Vec<_>>().join(""))
}

/// The modes with values in rows that fit.
fn modes_of(report: &Report, fits: impl Fn(&Row) -> bool) -> Vec<&'static str> {
    let has = |mode: &str| report.rows.iter().any(|row| row.mode == mode && row.value.is_some() && fits(row));
    measured(report).map(|mode| mode.name).filter(|mode| has(mode)).collect()
}

/// The groups of the rows, in order.
fn groups(report: &Report) -> Vec<&'static str> {
    let mut groups: Vec<&str> = report.rows.iter().map(|row| row.group).collect();
    groups.dedup();
    groups
}

fn programs(report: &Report) -> String {
    let low = report.rows.iter().filter_map(|row| row.percent_of_native).fold(10.0, f64::min);
    let mut figures = String::new();
    for group in groups(report).into_iter().filter(|group| ![CHASE, NANO].contains(group)) {
        let both = [Form::Log, Form::Linear].map(|form| bars::percentages(report, group, form, low));
        if let [Some(log), Some(linear)] = both {
            let _ = writeln!(figures, "<figure><h3>{}</h3>\n{log}{linear}</figure>", escape(group));
        }
    }
    if figures.is_empty() {
        return String::new();
    }
    let modes = modes_of(report, |row| row.is_in_mean && row.mode != REFERENCE);
    format!(
        "<h2>Speed, in percent of native</h2>\n<p>Longer is faster; the dashed line is the host itself. The thin line at a \
         bar's end goes from the slowest to the fastest run.</p>\n\
         <div><input type=\"radio\" name=\"scale\" id=\"log\" checked><label for=\"log\"> logarithmic</label> \
         <input type=\"radio\" name=\"scale\" id=\"linear\"><label for=\"linear\"> linear (▸: beyond the scale)</label>\n\
         {}<div class=\"columns\">\n{figures}</div>\n</div>\n",
        legend(&modes)
    )
}

fn chase(report: &Report) -> String {
    let is_chase = |row: &Row| row.benchmark.starts_with("chase-") || row.benchmark.starts_with("huge-");
    let mut figures = String::new();
    let plots = [
        (What::Slowdown, PageSize::Small, "4 KiB pages: time of a load, native = 1"),
        (What::Time, PageSize::Small, "4 KiB pages: time of a load"),
        (What::Slowdown, PageSize::Huge, "2 MiB pages: time of a load, native = 1"),
        (What::Time, PageSize::Huge, "2 MiB pages: time of a load"),
    ];
    for (what, pages, caption) in plots {
        if let Some(plot) = curves::plot(report, pages, what) {
            let _ = writeln!(figures, "<figure><h3>{caption}</h3>\n{plot}</figure>");
        }
    }
    if figures.is_empty() {
        return String::new();
    }
    format!(
        "<h2>Pointer chase: what memory costs</h2>\n<p>Each load's address is what the load before it found, so nothing \
         overlaps: caches first, then what finds the page. Lower is faster.</p>\n{}<div class=\"columns\">\n{figures}</div>\n",
        legend(&modes_of(report, is_chase))
    )
}

fn operations(report: &Report) -> String {
    let Some(plots) = bars::values(report, NANO, 2) else { return String::new() };
    let figures: Vec<String> = plots.iter().map(|plot| format!("<figure>{plot}</figure>\n")).collect();
    format!(
        "<h2>Single operations, in cycles</h2>\n<p>In a guest without an operating system; cycles of the host's time-stamp \
         counter, logarithmic. Shorter is faster. Natively only what a process can do; <code>nano-syscall</code>, \
         <code>nano-pgfault</code> and <code>nano-divzero</code> are there what this host's kernel makes of them (a system \
         call, signals), and no measure of the others.</p>\n{}<div class=\"columns\">\n{}</div>\n",
        legend(&modes_of(report, |row| row.group == NANO)),
        figures.concat()
    )
}

fn comparison(report: &Report) -> String {
    let Some(comparison) = &report.comparison else { return String::new() };
    let mut text = format!(
        "<h2>Compared with {}</h2>\n<details><summary>{} rows</summary><div class=\"scroll\"><table>\n<tr><th>benchmark</th><th>mode</th><th>old</th><th>new</th>\
         <th>new/old</th><th></th></tr>\n",
        escape(&comparison.file),
        comparison.rows.len()
    );
    for row in &comparison.rows {
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.2}</td><td>{}</td></tr>",
            escape(&row.benchmark),
            escape(&row.mode),
            value(row.old, &row.unit),
            value(row.new, &row.unit),
            row.ratio,
            row.verdict.word()
        );
    }
    text.push_str("</table></div></details>\n");
    comparison.notes.iter().for_each(|note| {
        let _ = writeln!(text, "<p>{}</p>", escape(note));
    });
    text
}

fn table(report: &Report) -> String {
    let modes: Vec<&str> = measured(report).map(|mode| mode.name).collect();
    let mut text =
        "<h2>All values</h2>\n<div class=\"scroll\"><table>\n<tr><th>benchmark</th><th>per</th>".to_owned();
    for mode in &modes {
        let share = if *mode == REFERENCE { "" } else { "<th>of native</th>" };
        let _ = write!(text, "<th>{}</th>{share}<th>spread</th>", escape(mode));
    }
    text.push_str("</tr>\n");
    let (mut last_group, mut last) = ("", "");
    for row in &report.rows {
        if row.group != last_group {
            last_group = row.group;
            let columns = 2 + modes.len() * 3;
            let _ = writeln!(
                text,
                "<tr class=\"group\"><td colspan=\"{columns}\">{}</td></tr>",
                escape(row.group)
            );
        }
        if row.benchmark == last {
            continue;
        }
        last = row.benchmark;
        let _ = write!(text, "<tr><td>{}</td><td>{}</td>", row.benchmark, escape(row.operation));
        modes.iter().for_each(|mode| cells(&mut text, report.row(row.benchmark, mode), *mode == REFERENCE));
        text.push_str("</tr>\n");
    }
    text + "</table></div>\n"
}

fn cells(text: &mut String, row: Option<&Row>, is_reference: bool) {
    let number = match row {
        Some(row) if row.timed_out => "timed out".to_owned(),
        Some(row) if row.error.is_some() => "failed".to_owned(),
        Some(row) => row.value.map_or_else(|| "–".to_owned(), |number| value(number, row.unit)),
        None => "–".to_owned(),
    };
    let share = row.and_then(|row| row.percent_of_native).map_or_else(String::new, percent);
    let share = if is_reference { String::new() } else { format!("<td>{share}</td>") };
    let spread = row.and_then(|row| row.spread).map_or_else(String::new, |spread| format!("{spread:.0} %"));
    let _ = write!(text, "<td>{number}</td>{share}<td class=\"faint\">{spread}</td>");
}

fn facts(report: &Report) -> String {
    let (host, settings) = (&report.host, &report.settings);
    let mut text = "<h2>How to read it</h2>\n<ul>\n\
        <li>Every program is the same file in every mode. Its time is taken on the host's clock, from a byte that it writes \
        before the work to one that it writes after it; a guest's own clock is only checked.</li>\n\
        <li>Percent of native is native time by this time. Rows that spend their time in the kernel compare two kernels too: \
        the host's, and the guest's.</li>\n\
        <li>Values are medians of runs taken in turn. A spread (largest run minus smallest, by the median) above some 10 % \
        says that the host did something else too; ratios inside one run still hold better than times.</li>\n\
        <li>The mean of all is geometric, over the rows above the pointer chase's curve and the single operations.</li>\n</ul>\n\
        <h2>What it was measured on</h2>\n<dl>\n"
        .to_owned();
    let mut fact = |name: &str, what: &str| {
        let _ = writeln!(text, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(what));
    };
    fact("host", &format!("{}, {} CPUs, counter at {:.2} GHz", host.cpu, host.cpus, host.tsc_hz / 1e9));
    fact("host's kernel", &format!("Linux {}", host.kernel));
    fact("load average", &format!("{:.1} at the end", host.load_average));
    if let Some(kernel) = &settings.guest_kernel {
        fact("guests", &format!("{kernel}, {} CPU, {}", settings.guest_cpus, settings.guest_memory));
    }
    fact("runs", &format!("{} of about {} ms each", settings.runs, settings.target_ms));
    for mode in &report.modes {
        let state = mode.skipped.as_ref().map_or_else(
            || {
                mode.boot_seconds
                    .filter(|_| mode.name != REFERENCE)
                    .map_or_else(String::new, |s| format!(", {s:.2} s to its start"))
            },
            |reason| format!(", left out: {reason}"),
        );
        fact(mode.name, &format!("{} ({}){state}", mode.version, mode.about));
    }
    text.push_str("</dl>\n");
    if !report.notes.is_empty() {
        text.push_str("<h2>Notes</h2>\n<ul>\n");
        report.notes.iter().for_each(|note| {
            let _ = writeln!(text, "<li>{}</li>", escape(note));
        });
        text.push_str("</ul>\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::catalog::BENCHMARKS;
    use crate::bench::report::tests::{example, example_of};

    #[test]
    fn page_is_one_file_with_bars_and_table() {
        let text = page(&example());
        assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>\n"));
        for foreign in ["http:", "https:", "<script", "url(", "@import", "src="] {
            assert!(!text.contains(foreign), "{foreign}");
        }
        assert!(text.contains("prefers-color-scheme: dark"));
        assert!(text.contains("sum (interp): 40.0 ns per addition, 5.0 % of native, spread 0 %"), "{text}");
        assert!(text.contains(">failed<") && text.contains("bt is left out: not built yet"), "{text}");
    }

    #[test]
    fn opened_elements_are_closed() {
        let text = page(&example());
        for element in ["svg", "figure", "table", "tr", "td", "div", "ul", "li", "dl", "rect", "text", "p"] {
            let opened =
                text.matches(&format!("<{element} ")).count() + text.matches(&format!("<{element}>")).count();
            assert_eq!(opened, text.matches(&format!("</{element}>")).count(), "{element}");
        }
    }

    #[test]
    fn chases_are_curves() {
        let first = BENCHMARKS.iter().position(|benchmark| benchmark.name == "chase-64k").unwrap();
        let text = page(&example_of(&BENCHMARKS[first..first + 2]));
        assert!(text.contains("interp, 64 KiB: 20.00 × native"), "{text}");
        assert!(
            text.contains("4 KiB pages: time of a load") && !text.contains("2 MiB pages: time"),
            "{text}"
        );
        assert!(!page(&example()).contains("Pointer chase"));
    }

    #[test]
    fn single_operations_are_bars_of_cycles() {
        let first = BENCHMARKS.iter().position(|benchmark| benchmark.is_nano()).unwrap();
        let text = page(&example_of(&BENCHMARKS[first..first + 2]));
        assert!(text.contains("nano-syscall (interp):") && text.contains(" cyc per operation"), "{text}");
        assert!(!text.contains("Speed, in percent"), "a system call of the host's kernel is no measure");
    }

    #[test]
    fn predictions_are_shown_if_there_are_any() {
        let mut report = example();
        assert!(!page(&report).contains("Prediction"));
        let events = crate::model::events::Events { walks: 1.0, ..Default::default() };
        report.predictions = vec![crate::model::table::Predicted::new("memsweep", "page", events, 40.0)];
        assert!(
            page(&report).contains("<h2>Prediction</h2>") && page(&report).contains("two-dimensional walk")
        );
    }

    #[test]
    fn empty_result_is_a_page_too() {
        let report = Report { rows: Vec::new(), ..example() };
        assert!(page(&report).contains("What it was measured on"));
    }
}

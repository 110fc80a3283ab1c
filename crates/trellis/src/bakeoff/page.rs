//! The result as a page for a browser, in the style of `trellis bench`'s.

use std::fmt::Write as _;

use super::explain::Explanation;
use super::report::{Bakeoff, ModeResult};
use super::text::time;
use crate::bench::html::svg::{Anchor, Scale, Svg, escape};
use crate::bench::html::{STYLE, class};
use crate::bench::table::percent;
use crate::model::table;

const WIDTH: f64 = 1100.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 1000.0;
const BAR: f64 = 26.0;
const GAP: f64 = 12.0;
/// Opacities by which neighbouring parts of a bar are told apart.
const SHADES: [&str; 4] = ["1", ".75", ".5", ".3"];

/// The whole page.
#[must_use]
pub fn page(bakeoff: &Bakeoff) -> String {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>trellis bakeoff</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>trellis bakeoff</h1>\n<p><code>{}</code></p>\n",
        escape(&bakeoff.workload)
    );
    text.push_str(&cards(bakeoff));
    text.push_str(&advice(bakeoff));
    text.push_str(&bars(bakeoff));
    for mode in &bakeoff.modes {
        if let Some(explanation) = &mode.explanation {
            text.push_str(&explained(mode, explanation));
        }
    }
    if let Some(predicted) = &bakeoff.predicted {
        let table = table::render(std::slice::from_ref(predicted));
        let _ =
            writeln!(text, "<h2>Prediction</h2>\n<div class=\"scroll\"><pre>{}</pre></div>", escape(&table));
    }
    let notes: String =
        bakeoff.notes.iter().map(|note| format!("<p class=\"faint\">{}</p>\n", escape(note))).collect();
    text + &notes + "</body>\n</html>\n"
}

fn cards(bakeoff: &Bakeoff) -> String {
    let mut text = "<div class=\"cards\">\n".to_owned();
    for mode in &bakeoff.modes {
        let value = mode.seconds.map_or_else(|| "-".to_owned(), time);
        let below = match (mode.percent_of_native, &mode.error, &mode.skipped) {
            (_, Some(why), _) | (_, None, Some(why)) => why.clone(),
            (Some(share), ..) if mode.name != "native" => format!("{} of native", percent(share)),
            _ => "a run".to_owned(),
        };
        let _ = writeln!(
            text,
            "<div class=\"card {}\"><span>{}</span><b>{}</b><span>{}</span></div>",
            class(mode.name),
            mode.name,
            escape(&value),
            escape(&below)
        );
    }
    text + "</div>\n"
}

fn advice(bakeoff: &Bakeoff) -> String {
    if bakeoff.advice.is_empty() {
        return String::new();
    }
    let lines: String = bakeoff.advice.iter().map(|line| format!("<li>{}</li>\n", escape(line))).collect();
    format!("<h2>Advice</h2>\n<ul>\n{lines}</ul>\n")
}

/// A bar a mode, of the parts of its time.
fn bars(bakeoff: &Bakeoff) -> String {
    let modes: Vec<&ModeResult> = bakeoff.modes.iter().filter(|mode| mode.seconds.is_some()).collect();
    let longest = modes.iter().filter_map(|mode| mode.seconds).fold(0.0, f64::max);
    if longest <= 0.0 {
        return String::new();
    }
    let mut svg = Svg::new(WIDTH, modes.len() as f64 * (BAR + GAP));
    let scale = Scale::linear([0.0, longest], [LEFT, RIGHT]);
    for (n, mode) in modes.iter().enumerate() {
        let y = n as f64 * (BAR + GAP);
        let seconds = mode.seconds.unwrap_or(0.0);
        svg.text("name", [LEFT - 8.0, y + BAR / 2.0 + 4.0], Anchor::End, mode.name);
        bar(&mut svg, mode, seconds, y, &scale);
        svg.text("value", [scale.place(seconds) + 6.0, y + BAR / 2.0 + 4.0], Anchor::Start, &time(seconds));
    }
    format!(
        "<h2>A run in each mode</h2>\n<p>Parts of a bar, dearest first, are those of the tables below; pointing at one shows which. What is \
         empty at a bar's end is unexplained.</p>\n<figure>{}</figure>\n",
        svg.finish("plot", "seconds a run by mode, in parts")
    )
}

fn bar(svg: &mut Svg, mode: &ModeResult, seconds: f64, y: f64, scale: &Scale) {
    let Some(explanation) = &mode.explanation else {
        let width = scale.place(seconds) - LEFT;
        return svg.bar(
            class(mode.name),
            [LEFT, y, width, BAR],
            &format!("{}: {}", mode.name, time(seconds)),
        );
    };
    let mut start = 0.0;
    let whole = explanation.seconds.max(f64::MIN_POSITIVE);
    for (n, part) in explanation.parts.iter().enumerate() {
        let length = part.seconds / whole * seconds;
        let (from, to) = (scale.place(start), scale.place(start + length));
        if to - from >= 0.5 {
            let title =
                format!("{}: {}, {:.1} %", part.what, time(part.seconds), part.seconds / whole * 100.0);
            let shade = SHADES[n % SHADES.len()];
            svg.faded_bar(class(mode.name), shade, [from, y, to - from, BAR], &title);
        }
        start += length;
    }
}

fn shown_count(count: f64) -> String {
    if count > 0.0 { format!("{count:.0}") } else { String::new() }
}

fn explained(mode: &ModeResult, explanation: &Explanation) -> String {
    let mut text = format!(
        "<h2>{}: where {} went</h2>\n<div class=\"scroll\"><table>\n<tr><th>part</th><th></th><th>time</th><th>share</th><th>count</th>\
         <th>each</th></tr>\n",
        mode.name,
        time(explanation.seconds)
    );
    let mut row = |class: &str, cells: [String; 6]| {
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        let _ = writeln!(text, "<tr{class}>{cells}</tr>");
    };
    let share =
        |seconds: f64| format!("{:.1} %", seconds / explanation.seconds.max(f64::MIN_POSITIVE) * 100.0);
    let each = |seconds: f64, count: f64| if count > 0.0 { time(seconds / count) } else { String::new() };
    for part in &explanation.parts {
        let count = part.count.unwrap_or(0.0);
        let shown = shown_count(count);
        let basis = format!("{:?}", part.basis).to_lowercase();
        let cells = [
            part.what.clone(),
            basis,
            time(part.seconds),
            share(part.seconds),
            shown,
            each(part.seconds, count),
        ];
        row(" class=\"group\"", cells);
        for r in part.rows.iter().filter(|row| row.seconds.is_some()).take(8) {
            let seconds = r.seconds.unwrap_or(0.0);
            let name = format!("\u{2003}{}", r.cause);
            let cells = [
                name,
                String::new(),
                time(seconds),
                share(seconds),
                shown_count(r.count),
                each(seconds, r.count),
            ];
            row("", cells);
        }
    }
    let rest = explanation.unexplained;
    let empty = String::new;
    row(" class=\"group\"", ["unexplained".to_owned(), empty(), time(rest), share(rest), empty(), empty()]);
    text.push_str("</table></div>\n");
    if !mode.functions.is_empty() {
        text.push_str("<h3>Dearest guest functions</h3>\n<div class=\"scroll\"><table>\n<tr><th>function</th><th>code</th><th>of samples</th><th>hottest instruction</th></tr>\n");
        for function in &mode.functions {
            let _ = writeln!(
                text,
                "<tr><td>{}</td><td>{}</td><td>{:.1} %</td><td>{:#x}</td></tr>",
                escape(&function.name),
                if function.kernel { "kernel" } else { "user" },
                function.percent,
                function.hottest
            );
        }
        text.push_str("</table></div>\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::text::tests::example;
    use super::*;

    #[test]
    fn page_shows_every_part_and_escapes_the_command() {
        let text = page(&example());
        assert!(text.contains("gzip -k &lt;file&gt;") && !text.contains("<file>"), "{text}");
        for wanted in
            ["unexplained", "Dearest guest functions", "Take bt.", "no answer within 5 s", "callouts"]
        {
            assert!(text.contains(wanted), "{wanted}");
        }
        assert!(!text.contains("<td>0</td>"), "what is not counted has no count");
        for element in ["table", "svg", "figure", "ul"] {
            let opened =
                text.matches(&format!("<{element}>")).count() + text.matches(&format!("<{element} ")).count();
            assert_eq!(opened, text.matches(&format!("</{element}>")).count(), "{element}");
        }
    }

    #[test]
    fn empty_result_is_a_page_too() {
        assert!(page(&Bakeoff::default()).contains("trellis bakeoff"));
    }
}

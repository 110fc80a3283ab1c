//! Pieces of SVG as text: shapes get their colours from the page's classes, so that both colour schemes work.

use std::fmt::Write as _;

/// Text that stands in HTML.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A drawing under construction; its size is in its own units, the page scales it.
#[derive(Debug)]
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

/// Where a text's position is in it.
#[derive(Clone, Copy, Debug)]
pub enum Anchor {
    /// At its start.
    Start,
    /// In its middle.
    Middle,
    /// At its end.
    End,
}

impl Svg {
    /// An empty drawing.
    #[must_use]
    pub fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    /// A bar with a text that is shown when it is pointed at.
    pub fn bar(&mut self, class: &str, [x, y, width, height]: [f64; 4], title: &str) {
        self.put(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{height:.1}" rx="1.5"><title>{}</title></rect>"#,
            width.max(0.8),
            escape(title)
        ));
    }

    /// The same, fainter: to be told from its neighbour.
    pub fn faded_bar(&mut self, class: &str, opacity: &str, [x, y, width, height]: [f64; 4], title: &str) {
        self.put(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" opacity="{opacity}"><title>{}</title></rect>"#,
            escape(title)
        ));
    }

    /// A straight line.
    pub fn line(&mut self, class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) {
        self.put(format_args!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    /// A line through points, and a dot with a text at each.
    pub fn curve(&mut self, class: &str, points: &[([f64; 2], String)]) {
        let path: Vec<String> = points.iter().map(|([x, y], _)| format!("{x:.1},{y:.1}")).collect();
        self.put(format_args!(r#"<polyline class="{class} curve" points="{}"/>"#, path.join(" ")));
        for ([x, y], title) in points {
            self.put(format_args!(
                r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="3"><title>{}</title></circle>"#,
                escape(title)
            ));
        }
    }

    /// A text.
    pub fn text(&mut self, class: &str, [x, y]: [f64; 2], anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.put(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(text)
        ));
    }

    fn put(&mut self, piece: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.body, "{piece}");
    }

    /// The element; `name` says what it shows to those who do not see it.
    #[must_use]
    pub fn finish(self, class: &str, name: &str) -> String {
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {:.0} {:.0}\" role=\"img\" aria-label=\"{}\">\n{}</svg>\n",
            self.width,
            self.height,
            escape(name),
            self.body
        )
    }
}

/// A scale of numbers on a stretch of the drawing.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    numbers: [f64; 2],
    places: [f64; 2],
    is_log: bool,
}

impl Scale {
    /// Equal differences are equally long.
    #[must_use]
    pub fn linear(numbers: [f64; 2], places: [f64; 2]) -> Self {
        Self { numbers, places, is_log: false }
    }

    /// Equal ratios are equally long.
    #[must_use]
    pub fn log(numbers: [f64; 2], places: [f64; 2]) -> Self {
        Self { numbers, places, is_log: true }
    }

    /// The place of a number; one outside is at the end.
    #[must_use]
    pub fn place(&self, number: f64) -> f64 {
        let at = |x: f64| if self.is_log { x.max(1e-9).ln() } else { x };
        let [low, high] = self.numbers.map(at);
        let part = ((at(number) - low) / (high - low)).clamp(0.0, 1.0);
        self.places[0] + part * (self.places[1] - self.places[0])
    }

    /// Whether a number is above the scale.
    #[must_use]
    pub fn is_beyond(&self, number: f64) -> bool {
        number > self.numbers[1]
    }
}

/// The powers of ten from one at or below `low` to one at or above `high`.
#[must_use]
pub fn decades(low: f64, high: f64) -> Vec<f64> {
    let mut powers = vec![10f64.powf((low.max(1e-9) * 1.000_001).log10().floor())];
    while let Some(last) = powers.last().filter(|last| **last < high * 0.999_999 && powers.len() < 20) {
        powers.push(last * 10.0);
    }
    powers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_keep_to_their_ends() {
        let log = Scale::log([1.0, 100.0], [0.0, 10.0]);
        assert!((log.place(10.0) - 5.0).abs() < 1e-9);
        assert_eq!((log.place(0.0), log.place(1e9)), (0.0, 10.0));
        assert!(log.is_beyond(101.0));
        assert!((Scale::linear([0.0, 4.0], [10.0, 0.0]).place(1.0) - 7.5).abs() < 1e-9);
    }

    #[test]
    fn decades_enclose() {
        let close = |powers: Vec<f64>, expected: &[f64]| {
            assert_eq!(powers.len(), expected.len(), "{powers:?}");
            assert!(powers.iter().zip(expected).all(|(a, b)| (a / b - 1.0).abs() < 1e-6), "{powers:?}");
        };
        close(decades(0.3, 40.0), &[0.1, 1.0, 10.0, 100.0]);
        close(decades(1.0, 10.0), &[1.0, 10.0]);
    }

    #[test]
    fn text_is_escaped() {
        let mut svg = Svg::new(1.0, 1.0);
        svg.text("a", [0.0, 0.0], Anchor::Start, "<b> & \"c\"");
        assert!(svg.finish("x", "a<b").contains("&lt;b&gt; &amp; &quot;c&quot;"));
    }
}

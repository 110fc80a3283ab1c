//! What a text-mode display shows, and how a terminal shows the same: code page 437 as Unicode, the 16
//! colours as SGR sequences, and only what changed since the last time.

use std::fmt::Write;

/// One character cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cell {
    /// Code page 437 character.
    pub glyph: u8,
    /// Attribute: foreground 3:0, background 6:4, bit 7 blink or bright background.
    pub attribute: u8,
}

/// A text screen at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextScreen {
    /// `rows` times `cols` cells, row by row.
    pub cells: Vec<Cell>,
    /// Column and row of the cursor, when it is visible and on the screen.
    pub cursor: Option<(usize, usize)>,
    /// Columns.
    pub cols: usize,
    /// Rows.
    pub rows: usize,
}

/// Code page 437, 0x00–0x1f as the display draws them.
const LOW: &str = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";
/// Code page 437, 0x7f–0xff.
const HIGH: &str = "⌂ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// The Unicode character of a code page 437 one, as the display draws it.
#[must_use]
pub fn cp437(glyph: u8) -> char {
    match glyph {
        0..0x20 => LOW.chars().nth(usize::from(glyph)).unwrap_or(' '),
        0x20..0x7f => char::from(glyph),
        0xff => ' ',
        _ => HIGH.chars().nth(usize::from(glyph - 0x7f)).unwrap_or(' '),
    }
}

/// VGA's colour order (blue is bit 0) in the order of SGR (red is bit 0).
const SGR: [u8; 8] = [0, 4, 2, 6, 1, 5, 3, 7];

/// The colours of an attribute.
//
// DEVIATION: bit 7 is not shown: blinking hurts in a terminal, and few guests turn it into brightness.
fn sgr(attribute: u8) -> String {
    let foreground = SGR[usize::from(attribute & 7)];
    let background = SGR[usize::from(attribute >> 4 & 7)];
    let base = if attribute & 8 != 0 { 90 } else { 30 };
    format!("\x1b[0;{};{}m", base + foreground, 40 + background)
}

impl TextScreen {
    /// The cells of a row.
    fn row(&self, row: usize) -> &[Cell] {
        self.cells.get(row * self.cols..(row + 1) * self.cols).unwrap_or(&[])
    }

    /// The screen as plain text: a line a row, without trailing blanks.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for row in 0..self.rows {
            let line: String = self.row(row).iter().map(|cell| cp437(cell.glyph)).collect();
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The control sequences that make a terminal show `screen`, given that it shows `previous` (nothing, or a
/// screen of another size: everything is drawn).
#[must_use]
pub fn render_ansi(screen: &TextScreen, previous: Option<&TextScreen>) -> String {
    let previous = previous.filter(|before| (before.cols, before.rows) == (screen.cols, screen.rows));
    let mut out = String::from("\x1b[?25l");
    if previous.is_none() {
        out.push_str("\x1b[0m\x1b[2J");
    }
    for row in 0..screen.rows {
        render_row(&mut out, screen, previous, row);
    }
    out.push_str("\x1b[0m");
    if let Some((col, row)) = screen.cursor {
        // Writing into a String cannot fail.
        let _ok = write!(out, "\x1b[{};{}H\x1b[?25h", row + 1, col + 1);
    }
    out
}

fn render_row(out: &mut String, screen: &TextScreen, previous: Option<&TextScreen>, row: usize) {
    let before = previous.map(|screen| screen.row(row));
    // Column after the last one drawn, and the attribute in effect there.
    let mut at = None;
    for (col, cell) in screen.row(row).iter().enumerate() {
        if before.is_some_and(|cells| cells.get(col) == Some(cell)) {
            continue;
        }
        let attribute = match at {
            Some((next, attribute)) if next == col => Some(attribute),
            _ => {
                let _ok = write!(out, "\x1b[{};{}H", row + 1, col + 1);
                None
            }
        };
        if attribute != Some(cell.attribute) {
            out.push_str(&sgr(cell.attribute));
        }
        out.push(cp437(cell.glyph));
        at = Some((col + 1, cell.attribute));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(text: &str) -> TextScreen {
        let cells = text.bytes().map(|glyph| Cell { glyph, attribute: 0x07 }).collect();
        TextScreen { cells, cursor: Some((1, 0)), cols: 4, rows: 2 }
    }

    #[test]
    fn cp437_tables_are_complete() {
        assert_eq!(LOW.chars().count(), 32);
        assert_eq!(HIGH.chars().count(), 129);
        assert_eq!(cp437(0xb3), '│');
        assert_eq!(cp437(0xdb), '█');
        assert_eq!(cp437(0xe1), 'ß');
        assert_eq!(cp437(0xfe), '■');
        assert_eq!(cp437(b'A'), 'A');
    }

    #[test]
    fn render_unchanged_draws_only_the_cursor() {
        let a = screen("abcdefgh");
        assert_eq!(render_ansi(&a, Some(&a)), "\x1b[?25l\x1b[0m\x1b[1;2H\x1b[?25h");
    }

    #[test]
    fn render_changed_run_is_drawn_with_its_colour() {
        let a = screen("abcdefgh");
        let mut b = screen("abXYefgh");
        b.cells[2].attribute = 0x1c;
        b.cells[3].attribute = 0x1c;
        b.cursor = None;
        assert_eq!(render_ansi(&b, Some(&a)), "\x1b[?25l\x1b[1;3H\x1b[0;91;44mXY\x1b[0m");
    }

    #[test]
    fn render_without_previous_draws_everything() {
        let out = render_ansi(&screen("abcdefgh"), None);
        assert!(out.contains("\x1b[2J") && out.contains("abcd") && out.contains("efgh"));
    }

    #[test]
    fn to_text_trims_lines() {
        assert_eq!(screen("ab  cd  ").to_text(), "ab\ncd\n");
    }
}

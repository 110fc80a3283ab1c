//! Frames on the terminal: the machines, and of the chosen one its CPUs and what its exits cost.

use ratatui::Frame as Area;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table, TableState};

use super::plain::{NONE, duration};
use super::rates::{Cpu, Frame, Machine};

const HEADER: Style = Style::new().add_modifier(Modifier::BOLD);
const GUEST: Color = Color::Green;
const EXITS: Color = Color::Yellow;
/// Characters of a CPU's bar.
const BAR: usize = 40;

/// What is on the screen.
#[derive(Default)]
pub struct View {
    frame: Option<Frame>,
    /// The machine whose causes are shown.
    chosen: Option<String>,
}

impl View {
    /// Shows this from now on.
    pub fn show(&mut self, frame: Frame) {
        self.frame = Some(frame);
    }

    /// Chooses the next machine, or the one before.
    pub fn select(&mut self, step: isize) {
        let at = self.at();
        let Some(frame) = &self.frame else { return };
        let last = frame.machines.len().saturating_sub(1);
        let at = at.saturating_add_signed(step).min(last);
        self.chosen = frame.machines.get(at).map(|m| m.info.name.clone());
    }

    /// Place of the chosen machine.
    fn at(&self) -> usize {
        let machines = self.frame.iter().flat_map(|frame| &frame.machines);
        machines.into_iter().position(|m| Some(&m.info.name) == self.chosen.as_ref()).unwrap_or(0)
    }

    /// Draws it.
    pub fn draw(&self, area: &mut Area<'_>) {
        let Some(frame) = &self.frame else {
            area.render_widget(Paragraph::new("looking for machines …"), area.area());
            return;
        };
        let rows = u16::try_from(frame.machines.len()).unwrap_or(u16::MAX).saturating_add(1);
        let chosen = frame.machines.get(self.at());
        let cpus = chosen.map_or(0, |m| u16::try_from(m.cpus.len()).unwrap_or(u16::MAX));
        let parts = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(rows.min(area.area().height / 2).max(2)),
            Constraint::Length(cpus.min(area.area().height / 4)),
            Constraint::Min(0),
        ]);
        let [title, machines, bars, causes] = parts.areas(area.area());
        area.render_widget(Paragraph::new(heading(frame)), title);
        if frame.machines.is_empty() {
            area.render_widget(Paragraph::new(NONE), machines);
            return;
        }
        let mut state = TableState::new().with_selected(Some(self.at()));
        area.render_stateful_widget(machine_table(frame), machines, &mut state);
        if let Some(m) = chosen {
            let lines: Vec<_> = m.cpus.iter().enumerate().map(|(n, cpu)| bar(n, cpu)).collect();
            area.render_widget(Paragraph::new(lines), bars);
            draw_causes(m, area, causes);
        }
    }
}

fn heading(frame: &Frame) -> Line<'static> {
    let count = match frame.machines.len() {
        1 => "1 machine".to_owned(),
        n => format!("{n} machines"),
    };
    let mut spans = vec![Span::styled("trellis top", HEADER), Span::raw(format!("  {count}"))];
    spans.extend(frame.ended.iter().map(|name| Span::styled(format!("  '{name}' has ended"), Color::Red)));
    spans.push(Span::styled("  q quits, ↑ ↓ choose", Modifier::DIM));
    Line::from(spans)
}

fn machine_table(frame: &Frame) -> Table<'_> {
    let header = ["NAME", "ENGINE", "CPUS", "UP", "LOAD", "IN GUEST", "EXITS/s", "MEMORY MiB", "GUEST"];
    let row = |m: &Machine| match &m.error {
        Some(error) => {
            Row::new([Cell::from(m.info.name.clone()), Cell::from(error.clone())]).style(Color::Red)
        }
        None => Row::new([
            m.info.name.clone(),
            m.info.engine.clone(),
            m.info.cpus.to_string(),
            duration(m.info.seconds),
            format!("{:.0} %", m.load),
            format!("{:.1} %", m.guest),
            format!("{:.0}", m.exits),
            format!("{} of {}", m.resident_bytes >> 20, m.info.memory_bytes >> 20),
            format!("{}{}", m.info.guest, if m.info.paused { " (paused)" } else { "" }),
        ]),
    };
    let widths = [
        Constraint::Min(8),
        Constraint::Length(6),
        Constraint::Length(4),
        Constraint::Length(8),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Length(10),
        Constraint::Length(14),
        Constraint::Fill(1),
    ];
    Table::new(frame.machines.iter().map(row), widths)
        .header(Row::new(header).style(HEADER))
        .row_highlight_style(Modifier::REVERSED)
}

/// A CPU's load as a bar: the guest's part, and that of exits.
fn bar(number: usize, cpu: &Cpu) -> Line<'static> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100 percent")]
    let cells = |percent: f64| ((percent / 100.0 * BAR as f64).round() as usize).min(BAR);
    let all = cells(cpu.load);
    let guest = cells(cpu.load * cpu.guest / 100.0).min(all);
    Line::from(vec![
        Span::raw(format!("vcpu{number:<3}")),
        Span::styled("█".repeat(guest), GUEST),
        Span::styled("▒".repeat(all - guest), EXITS),
        Span::styled("·".repeat(BAR - all), Modifier::DIM),
        Span::raw(format!(" {:3.0} %, in guest {:3.0} %", cpu.load, cpu.guest)),
    ])
}

fn draw_causes(m: &Machine, area: &mut Area<'_>, place: Rect) {
    let row = |cause: &super::rates::Cause| {
        Row::new([
            cause.name.clone(),
            format!("{:>12.0}", cause.rate),
            cause.cycles.map_or_else(String::new, |cycles| format!("{cycles:>12.0}")),
            cause.share.map_or_else(String::new, |share| format!("{share:>6.1} %")),
        ])
    };
    let widths =
        [Constraint::Length(38), Constraint::Length(12), Constraint::Length(12), Constraint::Length(9)];
    let header = ["CAUSE", "  PER SECOND", " CYCLES EACH", "   SHARE"];
    let table = Table::new(m.causes.iter().map(row), widths)
        .header(Row::new(header).style(HEADER))
        .block(Block::bordered().title(format!(" exits of {} ", m.info.name)));
    area.render_widget(table, place);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::rates::{Cause, samples};
    use super::*;

    fn screen(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|area| view.draw(area)).unwrap();
        terminal.backend().to_string()
    }

    fn machine(name: &str) -> Machine {
        let cause =
            Cause { name: format!("callout {name}"), rate: 1000.0, cycles: Some(654.0), share: Some(20.0) };
        Machine {
            info: samples::info(name),
            load: 50.0,
            guest: 75.0,
            cpus: vec![Cpu { load: 50.0, guest: 75.0 }],
            causes: vec![cause],
            ..Machine::default()
        }
    }

    #[test]
    fn screen_shows_machines_and_the_causes_of_the_chosen_one() {
        let mut view = View::default();
        assert!(screen(&view, 80, 24).contains("looking for machines"));
        view.show(Frame { machines: vec![machine("web"), machine("db")], ended: vec!["old".into()] });
        let text = screen(&view, 100, 24);
        assert!(text.contains("2 machines") && text.contains("'old' has ended"), "{text}");
        assert!(text.contains("callout web") && !text.contains("callout db"), "{text}");
        view.select(1);
        view.select(1);
        assert!(screen(&view, 100, 24).contains("callout db"));
        // The chosen one ends, and then all do.
        view.show(Frame { machines: vec![machine("web")], ended: Vec::new() });
        assert!(screen(&view, 100, 24).contains("callout web"));
        view.show(Frame::default());
        assert!(screen(&view, 100, 24).contains("trellis boot"));
    }

    #[test]
    fn terminals_of_any_size_are_drawn_on() {
        let mut view = View::default();
        let mut dead = machine("dead");
        dead.error = Some("does not answer".into());
        view.show(Frame {
            machines: (0..40).map(|n| machine(&n.to_string())).chain([dead]).collect(),
            ended: vec![],
        });
        for (width, height) in [(1, 1), (5, 3), (20, 10), (300, 100)] {
            screen(&view, width, height);
        }
    }
}

//! Golden translations: `golden/*.txt` say what host code a few guest instructions become, and how many host instructions each guest
//! instruction costs on the straight line. A change of either is meant to be seen.
//!
//! A case begins with `== name`, may say which facts hold and which hints there are (`facts: user fp=none halves@0 …`), and gives its guest bytes (`bytes: 48 01 d8`); the rest
//! is written by `TRELLIS_GOLDEN=write cargo test -p bt --test golden`.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test of small numbers")]

use std::fmt::Write as _;
use std::path::PathBuf;

use bt::hints::{Form, Hints};
use bt::listing::{Part, parts, text};
use bt::{Facts, FpLevel, Fragment, Legacy, TimeStamp, Variant, translate};
use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction};

/// Where the code lies if the facts say that it knows.
const PAGE: u64 = 0xffff_ffff_8123_4000;
/// Where in its page.
const OFFSET: usize = 0x100;

fn facts(words: &str) -> Facts {
    let mut f = Facts { page_rip: Some(PAGE), amd: true, ..Facts::MODERN };
    for word in words.split_whitespace() {
        match word {
            "kernel" => {}
            "user" => (f.page_rip, f.variant) = (None, Variant::User),
            "ac" => f.variant = Variant::SupervisorAc,
            "plain" => f.plain = true,
            "bmi2=off" => f.bmi2 = false,
            "fp=none" => f.fp = FpLevel::None,
            "32" | "32-based" | "16" => {
                let flat = word == "32";
                let bits16 = word == "16";
                f.legacy = Some(Legacy { bits16, flat_code: flat, flat_data: flat, wide_stack: !bits16 });
                f.page_rip = f.page_rip.map(|rip| rip & 0xffff_f000);
            }
            "rdtsc=callout" => f.rdtsc = TimeStamp::Callout,
            "rdtsc=trap" => f.rdtsc = TimeStamp::Trap,
            hint if hint.contains('@') => {}
            other => panic!("no such fact: {other}"),
        }
    }
    f
}

/// The hints among the words: `halves@1` is one for the second instruction.
fn hints(words: &str, guest: &[Instruction]) -> Hints {
    let mut hints = Hints::new();
    for (form, number) in words.split_whitespace().filter_map(|word| word.split_once('@')) {
        let form = match form {
            "alone" => Form::Alone,
            "halves" => Form::Halves,
            "direct" => Form::Direct,
            other => panic!("no such form: {other}"),
        };
        hints.add(guest[number.parse::<usize>().unwrap()].ip() as u16, form);
    }
    hints
}

fn bytes(hex: &str) -> Vec<u8> {
    hex.split_whitespace().map(|b| u8::from_str_radix(b, 16).unwrap()).collect()
}

fn guest_text(i: &Instruction) -> String {
    let mut out = String::new();
    FastFormatter::new().format(i, &mut out);
    out
}

/// Host instructions from `from` to `to`.
fn count(parts: &[Part], from: usize, to: usize) -> usize {
    parts.iter().filter(|p| matches!(p, Part::Instruction(_)) && (from..to).contains(&p.offset())).count()
}

fn host_lines(out: &mut String, parts: &[Part], from: usize, to: usize) {
    for part in parts.iter().filter(|p| (from..to).contains(&p.offset())) {
        let _ = match part {
            Part::Instruction(i) => writeln!(out, "  {:4x}  {}", part.offset(), text(i)),
            Part::Number(at, n) => writeln!(out, "  {at:4x}  .number {n}"),
        };
    }
}

fn describe(code: &[u8], words: &str) -> String {
    let facts = facts(words);
    let mut page = [0xcc; 4096];
    page[OFFSET..OFFSET + code.len()].copy_from_slice(code);
    // What follows overwrites all flags: cmp eax, eax.
    page[OFFSET + code.len()..OFFSET + code.len() + 2].copy_from_slice(&[0x39, 0xc0]);
    let guest: Vec<Instruction> =
        Decoder::with_ip(facts.decoding().bits, code, OFFSET as u64, DecoderOptions::AMD)
            .into_iter()
            .collect();
    let mut reader = bt::unit::Reader::new(&page, facts.decoding());
    let mut unit = reader.form(OFFSET, guest.len());
    unit.hints = hints(words, &guest);
    assert_eq!(unit.instructions.len(), guest.len(), "the unit takes all instructions");
    let f: Fragment = translate(&unit, &mut reader, facts, 0, 0, &|_| true);
    // The engine puts a jump over the entry of what is closed, and puts back what was there.
    for place in f.exits.iter().filter_map(|e| e.place) {
        assert!(place as usize >= f.inner + 5, "{place} of {}", guest_text(&guest[0]));
    }
    let parts = parts(&f.code).expect("a fragment consists of instructions and numbers");
    let mut out = String::new();
    let _ = writeln!(out, "entry: {} host instructions", count(&parts, 0, f.inner));
    host_lines(&mut out, &parts, 0, f.inner);
    for (n, i) in guest.iter().enumerate() {
        let from = f.map[n].host as usize;
        let to = f.map.get(n + 1).map_or(f.leave, |p| p.host as usize);
        let _ = writeln!(out, "guest: {}: {} host instructions", guest_text(i), count(&parts, from, to));
        host_lines(&mut out, &parts, from, to);
    }
    let _ = writeln!(out, "leave: {} host instructions", count(&parts, f.leave, f.straight));
    host_lines(&mut out, &parts, f.leave, f.straight);
    let _ = writeln!(
        out,
        "out of line: {} host instructions, {} bytes of {}; {} sites, {} exits, {} callouts",
        count(&parts, f.straight, f.code.len()),
        f.code.len() - f.straight,
        f.code.len(),
        f.sites.len(),
        f.exits.len(),
        f.callouts
    );
    host_lines(&mut out, &parts, f.straight, f.code.len());
    out
}

/// The file as the translator makes it.
fn regenerate(file: &str) -> String {
    let mut out = String::new();
    let (mut words, mut header) = (String::new(), true);
    for line in file.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            let _ = writeln!(out, "{}== {name}", if header { "" } else { "\n" });
            (words, header) = (String::new(), false);
        } else if let Some(rest) = line.strip_prefix("facts: ") {
            words = rest.to_owned();
            let _ = writeln!(out, "facts: {rest}");
        } else if let Some(rest) = line.strip_prefix("bytes: ") {
            let _ = writeln!(out, "bytes: {rest}");
            out += &describe(&bytes(rest), &words);
        } else if header {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

#[test]
fn translations_are_golden() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden");
    let write = std::env::var("TRELLIS_GOLDEN").as_deref() == Ok("write");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(files.len() > 10, "the golden files are there");
    let mut wrong = Vec::new();
    for path in files {
        let old = std::fs::read_to_string(&path).unwrap();
        let new = regenerate(&old);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if write {
            std::fs::write(&path, new).unwrap();
        } else if old != new {
            let differing = old.lines().zip(new.lines()).enumerate().find(|(_, (a, b))| a != b);
            let place = differing.map_or_else(
                || "its length".to_owned(),
                |(n, (a, b))| format!("line {}:\n  golden:     {a}\n  translated: {b}", n + 1),
            );
            wrong.push(format!("{name} differs at {place}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nIf that is meant: TRELLIS_GOLDEN=write cargo test -p bt --test golden, and look at the difference",
        wrong.join("\n")
    );
}

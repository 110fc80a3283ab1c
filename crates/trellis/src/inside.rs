//! The options that look inside a running machine: `--trace`, `--trace-range`, `--perf-map`, `--jitdump`, `--profile`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use vmm::{AddressRange, Levels};

use crate::suggest;

/// The names of the levels.
const LEVELS: &[&str] = &["events", "fragments", "exits", "instructions", "code"];

/// What `--trace` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceSpec {
    /// The devices' events.
    pub events: bool,
    /// What the engine does.
    pub engine: Levels,
    /// Where the lines go; standard error if nothing is said.
    pub file: Option<PathBuf>,
}

/// The options as written.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct InsideFlags {
    /// Write a trace: events (of devices), and with --engine bt fragments, exits, instructions, code; a FILE alone gets the events
    #[arg(long, value_name = "LEVEL,…[:FILE]|FILE", value_parser = parse_trace, help_heading = "Run")]
    pub trace: Option<TraceSpec>,
    /// Trace the engine only at these guest addresses, both included, as in ffffffff81000000-ffffffff81000fff
    #[arg(long, value_name = "A-B", value_parser = parse_range, help_heading = "Run")]
    pub trace_range: Option<AddressRange>,
    /// Tell perf what translated code is, in /tmp/perf-PID.map
    #[arg(long, help_heading = "Run")]
    pub perf_map: bool,
    /// Tell perf everything about translated code, in DIR/jit-PID.dump [default: the current directory]
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true, default_missing_value = ".",
          value_hint = ValueHint::DirPath, help_heading = "Run")]
    pub jitdump: Option<PathBuf>,
    /// Sample what the translator executes, so often a second, and say with --stats where: guest addresses, and what host code is for [default: 997]
    #[arg(long, value_name = "HZ", value_parser = parse_hz, num_args = 0..=1, require_equals = true, default_missing_value = "997", help_heading = "Run")]
    pub profile: Option<u32>,
}

/// Parses the value of `--profile`.
///
/// # Errors
/// One line with what is possible.
pub fn parse_hz(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{}' is no rate; give 1 to 20000 samples a second", text.escape_debug());
    text.trim().parse().ok().filter(|hz| (1..=20_000).contains(hz)).ok_or_else(wrong)
}

impl InsideFlags {
    /// `self` where it says something, `file` elsewhere.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        Self {
            trace: self.trace.or(file.trace),
            trace_range: self.trace_range.or(file.trace_range),
            perf_map: self.perf_map || file.perf_map,
            jitdump: self.jitdump.or(file.jitdump),
            profile: self.profile.or(file.profile),
        }
    }

    /// The first of the options that only the translator heeds.
    #[must_use]
    pub fn needs_translator(&self) -> Option<&'static str> {
        let engine = self.trace.as_ref().is_some_and(|trace| trace.engine.any());
        if engine {
            Some("a trace of fragments, exits, instructions or code")
        } else if self.trace_range.is_some() {
            Some("--trace-range")
        } else if self.perf_map {
            Some("--perf-map")
        } else if self.profile.is_some() {
            Some("--profile")
        } else {
            self.jitdump.as_ref().map(|_| "--jitdump")
        }
    }

    /// The paths in it made relative to `base`.
    #[must_use]
    pub fn relative_to(mut self, base: &Path) -> Self {
        if let Some(file) = self.trace.as_mut().and_then(|trace| trace.file.as_mut()) {
            *file = base.join(&*file);
        }
        self.jitdump = self.jitdump.map(|directory| base.join(directory));
        self
    }
}

/// Parses the value of `--trace`.
///
/// # Errors
/// One line, for what looks like a level but is none.
pub fn parse_trace(text: &str) -> Result<TraceSpec, String> {
    let (levels, file) = match text.split_once(':') {
        Some((levels, file)) => (levels, Some(file)),
        None => (text, None),
    };
    let names: Vec<&str> = levels.split(',').collect();
    if !names.iter().all(|name| LEVELS.contains(name)) {
        return file_alone(text, &names);
    }
    if file == Some("") {
        return Err("no file is named behind the colon; leave it out for standard error".to_owned());
    }
    let has = |level: &str| names.contains(&level);
    Ok(TraceSpec {
        events: has("events"),
        engine: Levels {
            fragments: has("fragments"),
            exits: has("exits"),
            instructions: has("instructions"),
            code: has("code"),
        },
        file: file.map(PathBuf::from),
    })
}

/// `--trace FILE`: events into a file, unless the name is all but a level's.
fn file_alone(text: &str, names: &[&str]) -> Result<TraceSpec, String> {
    let is_listed = names.len() > 1 || text.contains(':');
    let near = |name: &str| suggest::nearest(name, LEVELS.iter().copied()).filter(|near| near.len() > 3);
    let plain = names.iter().all(|name| !name.contains(['/', '.']));
    let some_level = names.iter().any(|name| LEVELS.contains(name));
    let wrong = names.iter().find(|name| !LEVELS.contains(*name)).copied().unwrap_or_default();
    match near(wrong) {
        Some(level) if some_level || plain && (is_listed || strsim::levenshtein(wrong, level) <= 2) => {
            Err(format!("'{wrong}' is no level; did you mean '{level}'? A file of that name is ./{wrong}"))
        }
        None if some_level => Err(format!("'{wrong}' is no level; levels are {}", LEVELS.join(", "))),
        _ if text.is_empty() => Err(format!("levels are {}", LEVELS.join(", "))),
        _ => Ok(TraceSpec { events: true, file: Some(PathBuf::from(text)), ..TraceSpec::default() }),
    }
}

/// Parses `A-B` or `A`, in hexadecimal with or without `0x`.
///
/// # Errors
/// One line with an example.
pub fn parse_range(text: &str) -> Result<AddressRange, String> {
    let (start, last) = text.split_once('-').unwrap_or((text, text));
    match (parse_address(start), parse_address(last)) {
        (Ok(start), Ok(last)) if start <= last => Ok(AddressRange { start, last }),
        (Ok(_), Ok(_)) => Err(format!("'{text}' ends before it begins")),
        _ => Err(format!(
            "'{text}' is no range of addresses; give one as in ffffffff81000000-ffffffff81000fff"
        )),
    }
}

/// Parses an address in hexadecimal, with or without `0x`.
///
/// # Errors
/// One line with an example.
pub fn parse_address(text: &str) -> Result<u64, String> {
    let digits = text.trim().trim_start_matches("0x").replace('_', "");
    let wrong = || format!("'{text}' is no address; give hexadecimal digits, as in ffffffff81000000");
    if digits.starts_with(['+', '-']) {
        return Err(wrong());
    }
    u64::from_str_radix(&digits, 16).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_takes_levels_with_and_without_a_file() {
        let spec = parse_trace("fragments,exits:a:b.txt").unwrap();
        assert!(spec.engine.fragments && spec.engine.exits && !spec.engine.code && !spec.events);
        assert_eq!(spec.file, Some("a:b.txt".into()));
        let spec = parse_trace("events,code").unwrap();
        assert!(spec.events && spec.engine.code && spec.file.is_none());
    }

    #[test]
    fn trace_takes_a_file_alone_for_events() {
        for name in ["trace.txt", "/tmp/x:y", "./fragment", "log", "t,u"] {
            let spec = parse_trace(name).unwrap();
            assert_eq!(
                (spec.events, spec.engine.any(), spec.file),
                (true, false, Some(name.into())),
                "{name}"
            );
        }
    }

    #[test]
    fn trace_names_the_level_that_was_meant() {
        for (text, meant) in [
            ("fragment", "'fragments'"),
            ("exits,instruction", "'instructions'"),
            ("exist:x.txt", "'exits'"),
            ("code,zzz", "levels are"),
            ("", "levels are"),
            ("code:", "standard error"),
        ] {
            let error = parse_trace(text).expect_err(text);
            assert!(error.contains(meant) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn rate_is_within_what_timers_can() {
        assert_eq!((parse_hz("997"), parse_hz("1")), (Ok(997), Ok(1)));
        for text in ["0", "-1", "x", "20001", ""] {
            assert!(parse_hz(text).unwrap_err().contains("1 to 20000"), "{text}");
        }
    }

    #[test]
    fn range_is_hexadecimal_and_in_order() {
        let range = |start, last| Ok(AddressRange { start, last });
        assert_eq!(parse_range("0x1000-1fff"), range(0x1000, 0x1fff));
        assert_eq!(parse_range("ffff_8000"), range(0xffff_8000, 0xffff_8000));
        for text in ["2-1", "x", "", "1-2-3", "+1"] {
            assert!(parse_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_override_the_file_and_its_paths_are_relative() {
        let file = InsideFlags {
            trace: Some(parse_trace("code:t").unwrap()),
            perf_map: true,
            ..InsideFlags::default()
        };
        let file = file.relative_to(Path::new("/vm"));
        assert_eq!(file.trace.as_ref().unwrap().file, Some("/vm/t".into()));
        let flags = InsideFlags { trace: Some(parse_trace("exits").unwrap()), ..InsideFlags::default() };
        let both = flags.or(file);
        assert!(both.perf_map && both.trace.as_ref().unwrap().engine.exits);
        assert_eq!(both.needs_translator(), Some("a trace of fragments, exits, instructions or code"));
        assert_eq!(InsideFlags::default().needs_translator(), None);
    }
}

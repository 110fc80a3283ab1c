//! The options of the machine's smaller devices: `--rtc`, `--balloon`, `--vsock`, and `--shutdown-grace`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use vmm::{BalloonOptions, BalloonReport, Endpoint, FIRST_CID, LAST_CID, RtcBase, VsockConfig};

use crate::control::server::bind_path;
use crate::options::{ClockChoice, parse_memory};
use crate::prepare::PrepareError;
use crate::suggest;

/// How long a guest may take to shut down without `--shutdown-grace`.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);
const RTC_USAGE: &str = "write --rtc base=utc, base=localtime or base=2026-01-31T12:00:00";
const BALLOON_USAGE: &str = "write --balloon, --balloon=256M, and behind it ,reporting=off ,oom=off";
const VSOCK_USAGE: &str = "write --vsock cid=3,socket=PATH";
/// The longest path of a socket (unix(7)), less what a port's number adds to it.
const MAX_SOCKET_LEN: usize = 107 - "_4294967295".len();

/// What the real-time clock shows, as written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RtcSpec {
    /// Universal time.
    #[default]
    Utc,
    /// The host's local time.
    Local,
    /// A moment, in seconds since 1970.
    At(i64),
}

/// One `--vsock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's address.
    pub cid: u32,
    /// The host's socket.
    pub socket: PathBuf,
}

/// The options as written.
#[derive(Args, Clone, Debug, Default, PartialEq)]
pub struct ExtraFlags {
    /// What the real-time clock shows at power-on: base=utc, base=localtime, or a moment as in base=2026-01-31T12:00:00 [default: utc]
    #[arg(long, value_name = "base=WHEN", value_parser = parse_rtc, help_heading = "Machine")]
    pub rtc: Option<RtcSpec>,
    /// A memory balloon, which gives free memory of the guest back to this host; SIZE is taken from the guest, see `trellis balloon`; ,reporting=off ,oom=off
    #[arg(long, value_name = "SIZE[,OPTION…]", value_parser = parse_balloon, num_args = 0..=1, require_equals = true,
          default_missing_value = "", help_heading = "Devices")]
    pub balloon: Option<BalloonOptions>,
    /// Sockets between guest and host: PATH takes `CONNECT PORT`, the guest's own calls to port P go to PATH_P [default: cid=3]
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = parse_vsock, help_heading = "Devices")]
    pub vsock: Option<VsockSpec>,
    /// How long the guest may take to shut down when SIGTERM, SIGINT or SIGHUP presses its power button; 0: end at once [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = parse_grace, allow_hyphen_values = true, help_heading = "Run")]
    pub shutdown_grace: Option<Duration>,
}

impl ExtraFlags {
    /// `self` where it says something, `file` elsewhere.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        Self {
            rtc: self.rtc.or(file.rtc),
            balloon: self.balloon.or(file.balloon),
            vsock: self.vsock.or(file.vsock),
            shutdown_grace: self.shutdown_grace.or(file.shutdown_grace),
        }
    }

    /// What the clock shows, for the machine.
    #[must_use]
    pub fn rtc_base(&self) -> RtcBase {
        match self.rtc.unwrap_or_default() {
            RtcSpec::Utc => RtcBase::Utc,
            RtcSpec::Local => RtcBase::Ahead(jiff::Zoned::now().offset().seconds().into()),
            RtcSpec::At(moment) => RtcBase::At(moment),
        }
    }

    /// How long the guest may take to shut down.
    #[must_use]
    pub fn grace(&self) -> Duration {
        self.shutdown_grace.unwrap_or(DEFAULT_GRACE)
    }

    /// Refuses a balloon that leaves the guest nothing.
    ///
    /// # Errors
    /// One line.
    pub fn check_balloon(&self, memory_bytes: u64) -> Result<(), PrepareError> {
        match self.balloon {
            Some(balloon) if balloon.size_bytes >= memory_bytes => Err(PrepareError::Usage(format!(
                "a balloon of {} MiB takes all of the guest's {} MiB; give a smaller --balloon or more --memory",
                balloon.size_bytes >> 20,
                memory_bytes >> 20
            ))),
            _ => Ok(()),
        }
    }

    /// Makes the socket of `--vsock`.
    ///
    /// # Errors
    /// What makes no sense together, and a path that cannot be had.
    pub fn plug_in(&self, clock: ClockChoice) -> Result<Option<VsockConfig>, PrepareError> {
        let Some(spec) = &self.vsock else { return Ok(None) };
        if clock == ClockChoice::Icount {
            return Err(PrepareError::Usage(
                "--clock icount is reproducible, which sockets are not; remove --vsock, or give --clock host"
                    .to_owned(),
            ));
        }
        let listener = bind_path(&spec.socket, "socket of --vsock").map_err(PrepareError::Failure)?;
        let endpoint = Endpoint::new(listener, &spec.socket);
        let endpoint = endpoint.map_err(|error| PrepareError::Failure(format!("--vsock: {error}")))?;
        Ok(Some(VsockConfig::new(spec.cid, endpoint)))
    }
}

/// Parses `base=utc|localtime|TIME`; the value alone will do.
///
/// # Errors
/// One line with the forms.
pub fn parse_rtc(text: &str) -> Result<RtcSpec, String> {
    let value = match text.split_once('=') {
        Some(("base", value)) => value,
        Some((name, _)) if !name.contains([':', '-']) => {
            return Err(format!("the clock has no option '{name}'; {RTC_USAGE}"));
        }
        _ => text,
    };
    match value {
        "utc" => return Ok(RtcSpec::Utc),
        "localtime" => return Ok(RtcSpec::Local),
        _ => {}
    }
    // With a zone it is a moment, without one it is what the clock shows.
    let moment = value.parse::<jiff::Timestamp>().ok();
    let shown = || value.parse::<jiff::civil::DateTime>().ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok();
    let moment = moment.or_else(|| shown().map(|zoned| zoned.timestamp()));
    moment.map(|moment| RtcSpec::At(moment.as_second())).ok_or_else(|| {
        let hint = suggest::did_you_mean(value, ["utc", "localtime"]);
        format!("'{value}' is no time for a clock{}", hint.unwrap_or_else(|| format!("; {RTC_USAGE}")))
    })
}

/// Parses `[SIZE][,reporting=on|off][,oom=on|off]`.
///
/// # Errors
/// One line.
pub fn parse_balloon(text: &str) -> Result<BalloonOptions, String> {
    let mut options = BalloonOptions::default();
    for (n, word) in text.split(',').enumerate() {
        match word.split_once('=') {
            None if n == 0 && matches!(word, "" | "on") => {}
            None if n == 0 => options.size_bytes = parse_balloon_size(word)?,
            Some(("reporting", value)) => options.reporting = switch("reporting", value)?,
            Some(("oom", value)) => options.deflate_on_oom = switch("oom", value)?,
            _ => {
                let name = word.split('=').next().unwrap_or_default();
                let hint = suggest::did_you_mean(name, ["reporting", "oom"]);
                let hint = hint.unwrap_or_else(|| format!("; {BALLOON_USAGE}"));
                return Err(format!("a balloon has no option '{name}'{hint}"));
            }
        }
    }
    Ok(options)
}

/// Parses the size of a balloon; as `--memory`, but nothing is possible.
///
/// # Errors
/// One line.
pub fn parse_balloon_size(text: &str) -> Result<u64, String> {
    match text.trim() {
        "0" => Ok(0),
        text => parse_memory(text).map_err(|error| match error.split_once("too little") {
            Some(_) => format!("a balloon of {text} is not worth it; give 0, or at least 2M"),
            None => error,
        }),
    }
}

fn switch(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{name} is on or off, not '{value}'")),
    }
}

/// Parses `cid=N,socket=PATH`.
///
/// # Errors
/// One line with the form.
pub fn parse_vsock(text: &str) -> Result<VsockSpec, String> {
    let (mut cid, mut socket) = (FIRST_CID, None);
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("cid", value)) => {
                let number = value.parse().ok().filter(|cid| (FIRST_CID..=LAST_CID).contains(cid));
                let wrong =
                    || format!("'{value}' is no address of a guest; give cid={FIRST_CID} to cid={LAST_CID}");
                cid = number.ok_or_else(wrong)?;
            }
            Some(("socket", path)) if path.len() > MAX_SOCKET_LEN => {
                return Err(format!(
                    "the path of the socket has at most {MAX_SOCKET_LEN} bytes; give a shorter one"
                ));
            }
            Some(("socket", path)) if !path.is_empty() => socket = Some(PathBuf::from(path)),
            _ => {
                let name = word.split('=').next().unwrap_or_default();
                let hint = suggest::did_you_mean(name, ["cid", "socket"])
                    .filter(|_| !["cid", "socket"].contains(&name));
                return Err(format!(
                    "'{word}' is no option of --vsock{}",
                    hint.unwrap_or_else(|| format!("; {VSOCK_USAGE}"))
                ));
            }
        }
    }
    let socket = socket.ok_or_else(|| format!("no socket is named; {VSOCK_USAGE}"))?;
    Ok(VsockSpec { cid, socket })
}

impl VsockSpec {
    /// The path becomes relative to `base`.
    #[must_use]
    pub fn relative_to(self, base: &Path) -> Self {
        Self { socket: base.join(self.socket), ..self }
    }
}

/// A balloon's report for people.
#[must_use]
pub fn balloon_text(report: &BalloonReport) -> String {
    let mebibytes = |bytes: u64| format!("{:>8} MiB", bytes >> 20);
    let mut lines = vec![
        ("wanted", mebibytes(report.wanted_bytes)),
        ("taken from the guest", mebibytes(report.actual_bytes)),
        ("free pages given back", mebibytes(report.reported_bytes)),
    ];
    for (name, value) in &report.guest {
        match name.strip_prefix("guest_") {
            Some("free_bytes") => lines.push(("guest: free", mebibytes(*value))),
            Some("available_bytes") => lines.push(("guest: available", mebibytes(*value))),
            Some("total_bytes") => lines.push(("guest: total", mebibytes(*value))),
            Some("cache_bytes") => lines.push(("guest: cache", mebibytes(*value))),
            _ => {}
        }
    }
    if !report.driver {
        lines.push(("the guest has no driver for it", String::new()));
    }
    lines.iter().map(|(name, value)| format!("{}\n", format!("{name:<24}{value}").trim_end())).collect()
}

/// Parses the seconds of `--shutdown-grace`.
///
/// # Errors
/// One line.
pub fn parse_grace(text: &str) -> Result<Duration, String> {
    match text.trim().parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("'{text}' is no time to wait; give seconds from 0 to 86400, as in 10 or 0.5")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_read() {
        assert_eq!(parse_rtc("base=utc"), Ok(RtcSpec::Utc));
        assert_eq!(parse_rtc("localtime"), Ok(RtcSpec::Local));
        assert_eq!(parse_rtc("base=2001-09-09T01:46:40"), Ok(RtcSpec::At(1_000_000_000)));
        assert_eq!(parse_rtc("base=2001-09-09T03:46:40+02:00"), Ok(RtcSpec::At(1_000_000_000)));
        assert_eq!(parse_rtc("base=2001-09-09"), Ok(RtcSpec::At(999_993_600)));
        for (text, expected) in [
            ("base=ucc", "did you mean 'utc'"),
            ("base=", "base=localtime"),
            ("clock=vm", "no option 'clock'"),
            ("base=2001-13-09", "base=utc"),
        ] {
            assert!(parse_rtc(text).unwrap_err().contains(expected), "{text}");
        }
    }

    #[test]
    fn balloons_are_read() {
        let plain = BalloonOptions::default();
        assert_eq!(parse_balloon(""), Ok(plain));
        assert_eq!(parse_balloon("256M"), Ok(BalloonOptions { size_bytes: 256 << 20, ..plain }));
        let off = BalloonOptions { size_bytes: 0, reporting: false, deflate_on_oom: false };
        assert_eq!(parse_balloon("0,reporting=off,oom=off"), Ok(off));
        assert_eq!(parse_balloon("reporting=off,oom=off"), Ok(off));
        for (text, expected) in [
            ("x", "size of memory"),
            ("4K", "at least 2M"),
            ("1G,report=off", "did you mean 'reporting'"),
            ("1G,reporting=no", "on or off"),
            ("1G,2G", "no option '2G'"),
        ] {
            let error = parse_balloon(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let flags = ExtraFlags { balloon: Some(parse_balloon("1G").unwrap()), ..ExtraFlags::default() };
        assert!(flags.check_balloon(1 << 30).is_err() && flags.check_balloon(2 << 30).is_ok());
    }

    #[test]
    fn sockets_are_read() {
        let spec = parse_vsock("cid=7,socket=a/b").unwrap().relative_to(Path::new("/x"));
        assert_eq!(spec, VsockSpec { cid: 7, socket: "/x/a/b".into() });
        assert_eq!(parse_vsock("socket=s").unwrap().cid, 3);
        for (text, expected) in [
            ("", "socket=PATH"),
            ("cid=3", "no socket"),
            ("cid=2,socket=s", "cid=3 to"),
            ("cid=4294967295,socket=s", "cid=3 to"),
            ("cid=x,socket=s", "cid=3 to"),
            ("socket=", "socket=PATH"),
            ("sock=s", "did you mean 'socket'"),
        ] {
            let error = parse_vsock(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse_vsock(&format!("socket={}", "x".repeat(97))).unwrap_err().contains("96 bytes"));
    }

    #[test]
    fn grace_may_be_nothing() {
        assert_eq!(parse_grace("0"), Ok(Duration::ZERO));
        assert_eq!(parse_grace("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["-1", "x", "nan", "1e9", ""] {
            assert!(parse_grace(text).is_err(), "{text}");
        }
    }
}

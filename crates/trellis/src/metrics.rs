//! `--metrics ADDR:PORT`: statistics of the running machine in Prometheus' text format (version 0.0.4), over HTTP at `/metrics`.
//!
//! Threads: one, which serves one request after another; it dies with the process. What comes from the network is untrusted: a request has a limit in
//! bytes and in time, nothing in it chooses anything but one of two pages, and the machine stops for its statistics at most every
//! [`STATS_AGE`], however often it is asked. Names follow Prometheus' conventions: base units, `_total` for what only grows. Costs that are estimated
//! from samples could become a little less; what is told never does.

use std::collections::HashMap;
use std::fmt::{Display, Write as _};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::thread::Builder;
use std::time::{Duration, Instant};

use engine::cost::Row;
use engine::report::Unit;
use vmm::{Stats, VmHandle};

use crate::control::Info;

/// Statistics younger than this are told again.
const STATS_AGE: Duration = Duration::from_millis(200);
/// A client has so long for its request, and for its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request.
const MAX_REQUEST_LEN: usize = 16 << 10;

/// Parses the value of `--metrics`.
///
/// # Errors
/// One line with an example.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text).parse::<u16>();
    if let Ok(port) = port {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    let wrong = || format!("'{}' is no address; write ADDR:PORT as in 127.0.0.1:9100", text.escape_debug());
    if text.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
        return Err(wrong());
    }
    text.to_socket_addrs().ok().and_then(|mut all| all.next()).ok_or_else(wrong)
}

/// A port that nobody serves yet.
#[derive(Debug)]
pub struct Bound(TcpListener);

/// Takes the port. Of port 0, which takes a free one, it is said which.
///
/// # Errors
/// One line.
pub fn bind(address: SocketAddr) -> Result<Bound, String> {
    let listener = TcpListener::bind(address).map_err(|error| {
        format!("cannot serve metrics at {address}: {error}; choose another --metrics ADDR:PORT")
    })?;
    if address.port() == 0 {
        let taken = listener.local_addr().map_err(|error| error.to_string())?;
        crate::terminal::tell(&format!("trellis: metrics are at http://{taken}/metrics\n"));
    }
    Ok(Bound(listener))
}

impl Bound {
    /// Serves the machine behind `handle`, which `info` describes.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn serve(self, handle: VmHandle, info: Info) -> io::Result<()> {
        let mut exporter =
            Exporter { handle, info, started: Instant::now(), page: None, told: HashMap::new() };
        Builder::new().name("metrics".to_owned()).spawn(move || {
            for stream in self.0.incoming() {
                match stream {
                    // A client that goes away in the middle is its own concern.
                    Ok(stream) => drop(exporter.answer(stream)),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        })?;
        Ok(())
    }
}

/// The machine, as Prometheus sees it.
struct Exporter {
    handle: VmHandle,
    info: Info,
    started: Instant,
    page: Option<(Instant, String)>,
    /// What was told of estimated counters.
    told: HashMap<String, f64>,
}

impl Exporter {
    fn answer(&mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let (status, text) = match request(&mut stream)?.as_deref() {
            Some("/metrics") => match self.page() {
                Some(page) => ("200 OK", page),
                None => ("503 Service Unavailable", "the machine has ended\n".to_owned()),
            },
            Some("/") => ("200 OK", "a Trellis machine; its metrics are at /metrics\n".to_owned()),
            Some(_) => ("404 Not Found", "there is only /metrics\n".to_owned()),
            None => ("400 Bad Request", "GET /metrics is all that is understood\n".to_owned()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            text.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(text.as_bytes())
    }

    fn page(&mut self) -> Option<String> {
        if self.page.as_ref().is_none_or(|(at, _)| at.elapsed() > STATS_AGE) {
            let stats = self.handle.stats()?;
            let text = self.text(&stats, vmm::host_tsc_hz());
            self.page = Some((Instant::now(), text));
        }
        self.page.as_ref().map(|(_, text)| text.clone())
    }

    /// All of it. `hz`: ticks of the host's time-stamp counter in a second.
    fn text(&mut self, stats: &Stats, hz: f64) -> String {
        let mut page = Page::default();
        self.machine(stats, &mut page);
        self.vcpus(stats, hz, &mut page);
        engines(stats, &mut page);
        page.family("trellis_device_events_total", "counter", "What devices counted.");
        for (name, counters) in &stats.devices {
            for (event, value) in counters {
                page.sample(&[("device", name), ("event", event)], value);
            }
        }
        page.0
    }

    fn machine(&self, stats: &Stats, page: &mut Page) {
        let info = &self.info;
        page.family("trellis_vm_info", "gauge", "What the machine is; always 1.");
        page.sample(&[("name", &info.name), ("guest", &info.guest), ("engine", &info.engine)], 1);
        let plain: [(&str, &str, &str, f64); 7] = [
            (
                "trellis_vm_uptime_seconds",
                "gauge",
                "Time since the machine's start.",
                self.started.elapsed().as_secs_f64(),
            ),
            (
                "trellis_vm_running_seconds_total",
                "counter",
                "Time that its CPUs could run.",
                stats.elapsed.as_secs_f64(),
            ),
            ("trellis_vm_memory_bytes", "gauge", "Guest memory.", float(stats.memory_bytes)),
            (
                "trellis_vm_memory_resident_bytes",
                "gauge",
                "Guest memory that the host holds.",
                float(stats.resident_bytes),
            ),
            ("trellis_vm_resets_total", "counter", "Resets.", float(stats.resets)),
            (
                "trellis_vm_restores_total",
                "counter",
                "Saves with restore that the guest asked for.",
                float(stats.restores),
            ),
            (
                "trellis_vm_serial_lost_bytes_total",
                "counter",
                "Serial output that was not taken.",
                float(stats.serial_lost_bytes),
            ),
        ];
        for (name, kind, help, value) in plain {
            page.family(name, kind, help);
            page.sample(&[], value);
        }
    }

    fn vcpus(&mut self, stats: &Stats, hz: f64, page: &mut Page) {
        let tables: Vec<_> = stats.vcpus.iter().map(|v| v.account(hz)).collect();
        type Time = fn(&vmm::VcpuStats) -> Duration;
        let times: [(&str, &str, Time); 3] = [
            ("trellis_vcpu_busy_seconds_total", "Time not asleep.", |v| v.busy),
            ("trellis_vcpu_asleep_seconds_total", "Time asleep in HLT or MWAIT.", |v| v.asleep),
            ("trellis_vcpu_cpu_seconds_total", "CPU time of the host.", |v| v.cpu),
        ];
        for (name, help, of) in times {
            page.family(name, "counter", help);
            stats
                .vcpus
                .iter()
                .enumerate()
                .for_each(|(n, v)| page.sample(&[("vcpu", &n)], of(v).as_secs_f64()));
        }
        page.family(
            "trellis_vcpu_instructions_total",
            "counter",
            "Instructions executed, as far as the engine counts them.",
        );
        stats.vcpus.iter().enumerate().for_each(|(n, v)| page.sample(&[("vcpu", &n)], v.instructions));
        page.family(
            "trellis_vcpu_guest_seconds_total",
            "counter",
            "Time in the guest's code: the rest beside all exits.",
        );
        for (n, table) in tables.iter().enumerate() {
            let value = self.never_less(format!("guest {n}"), table.guest() / hz);
            page.sample(&[("vcpu", &n)], value);
        }
        page.family("trellis_vcpu_accounting_seconds_total", "counter", "What measuring itself took.");
        for (n, table) in tables.iter().enumerate() {
            let value = self.never_less(format!("accounting {n}"), table.overhead() / hz);
            page.sample(&[("vcpu", &n)], value);
        }
        let rows = || tables.iter().enumerate().flat_map(|(n, t)| t.rows.iter().map(move |r| (n, r)));
        page.family("trellis_vcpu_exits_total", "counter", "Exits by cause.");
        rows().for_each(|(n, r)| page.sample(&labels(&n, r), r.count));
        page.family(
            "trellis_vcpu_exit_seconds_total",
            "counter",
            "Time that exits took, by cause, where it is measured.",
        );
        for (n, row) in rows() {
            if let Some(ticks) = row.total() {
                let value = self.never_less(format!("exit {n} {} {}", row.kind, row.cause), ticks / hz);
                page.sample(&labels(&n, row), value);
            }
        }
    }

    fn never_less(&mut self, what: String, value: f64) -> f64 {
        let told = self.told.entry(what).or_default();
        *told = told.max(value);
        *told
    }
}

fn labels<'a>(vcpu: &'a usize, row: &'a Row) -> [(&'static str, &'a dyn Display); 3] {
    [("vcpu", vcpu), ("kind", &row.kind), ("cause", &row.cause)]
}

/// What the engines say of their work, by unit.
fn engines(stats: &Stats, page: &mut Page) {
    let report = stats.engine();
    let families = [
        ("trellis_engine_events_total", "counter", "What the engine counted.", Unit::Count, false),
        ("trellis_engine_bytes_total", "counter", "Bytes that the engine counted.", Unit::Bytes, false),
        ("trellis_engine_seconds_total", "counter", "Times of the engine's work.", Unit::Nanoseconds, false),
        ("trellis_engine_objects", "gauge", "What the engine has now.", Unit::Count, true),
        ("trellis_engine_memory_bytes", "gauge", "Memory that the engine uses now.", Unit::Bytes, true),
    ];
    for (name, kind, help, unit, gauge) in families {
        let mut counters = report.counters.iter().filter(|c| (c.unit, c.gauge) == (unit, gauge)).peekable();
        if counters.peek().is_some() {
            page.family(name, kind, help);
        }
        for counter in counters {
            let seconds = if unit == Unit::Nanoseconds { 1e-9 } else { 1.0 };
            page.sample(&[("name", &counter.name)], float(counter.value) * seconds);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has nothing but these")]
const fn float(n: u64) -> f64 {
    n as f64
}

/// Text in Prometheus' format, family by family.
#[derive(Default)]
struct Page(String, &'static str);

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.1 = name;
        // Writing to a string does not fail, here and below.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, labels: &[(&str, &dyn Display)], value: impl Display) {
        let escaped = |value: &dyn Display| {
            value.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
        };
        let labels: Vec<_> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(*value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{}{labels} {value}", self.1);
    }
}

/// The path of a GET request, whose headers are read to their end; None: it is no such request.
fn request(stream: &mut TcpStream) -> io::Result<Option<String>> {
    let deadline = Instant::now() + PATIENCE;
    let mut text = Vec::new();
    let mut chunk = [0; 2048];
    while !text.windows(4).any(|end| end == b"\r\n\r\n") && !text.windows(2).any(|end| end == b"\n\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || text.len() > MAX_REQUEST_LEN {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => break,
            count => text.extend_from_slice(&chunk[..count]),
        }
    }
    Ok(path(&String::from_utf8_lossy(&text)))
}

fn path(request: &str) -> Option<String> {
    let mut words = request.lines().next()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_get = method == "GET" && version.starts_with("HTTP/1.");
    is_get.then(|| target.split('?').next().unwrap_or(target).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_an_address_and_a_port_or_a_port_alone() {
        let at = |text: &str| parse_address(text).map(|a| a.to_string());
        assert_eq!(at("9100").as_deref(), Ok("127.0.0.1:9100"));
        assert_eq!(at(":9100").as_deref(), Ok("127.0.0.1:9100"));
        assert_eq!(at("0.0.0.0:1").as_deref(), Ok("0.0.0.0:1"));
        assert_eq!(at("[::1]:9100").as_deref(), Ok("[::1]:9100"));
        for bad in ["", "x", "127.0.0.1", "1.2.3.4:70000", "-1", "::1", "a\nb:9"] {
            let error = at(bad).unwrap_err();
            assert!(error.contains("127.0.0.1:9100") && !error.contains('\n'), "{bad}: {error}");
        }
    }

    #[test]
    fn only_get_is_understood() {
        assert_eq!(path("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").as_deref(), Some("/metrics"));
        assert_eq!(path("GET /metrics?a=b HTTP/1.0\r\n\r\n").as_deref(), Some("/metrics"));
        for bad in ["", "\r\n", "POST /metrics HTTP/1.1\r\n", "GET /metrics", "GET /metrics FTP/1"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut page = Page::default();
        page.family("a_total", "counter", "An a.");
        page.sample(&[("guest", &"a\"b\\c\nd")], 7);
        assert_eq!(
            page.0,
            "# HELP a_total An a.\n# TYPE a_total counter\na_total{guest=\"a\\\"b\\\\c\\nd\"} 7\n"
        );
    }
}

//! `VM.toml`: a machine described in a file.
//!
//! Keys are those of the command line; `monitor.virtual_exec` and `monitor.virtual_mmu` are the field's names for the choice
//! of engine and MMU. Paths are relative to the file. An unknown key is an error that names the nearest one.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::control::{self, ControlTarget};
use crate::extras::{ExtraFlags, parse_balloon, parse_grace, parse_rtc, parse_vsock};
use crate::gdb::{self, GdbTarget, Place};
use crate::inside::{self, InsideFlags, parse_range, parse_trace};
use crate::metrics;
use crate::net::{NetFlags, parse_forward, parse_net};
use crate::options::{
    CharTarget, DiskSpec, MmuChoice, ShareSpec, StatsTarget, VirtualExec, VmFlags, parse_char_target,
    parse_choice, parse_cpu, parse_cpus, parse_disk, parse_memory, parse_root, parse_share, parse_stats,
    parse_timeout,
};
use crate::suggest;

const KEYS: &[&str] = &[
    "image",
    "kernel",
    "initrd",
    "append",
    "disk",
    "cdrom",
    "snapshot",
    "share",
    "root",
    "net",
    "forward",
    "memory",
    "cpus",
    "cpu",
    "engine",
    "mmu",
    "rtc",
    "balloon",
    "vsock",
    "shutdown_grace",
    "serial",
    "vga",
    "debugcon",
    "isa_debug_exit",
    "no_reboot",
    "timeout",
    "name",
    "control",
    "metrics",
    "gdb",
    "gdb_wait",
    "stats",
    "trace",
    "trace_range",
    "perf_map",
    "jitdump",
    "profile",
    "clock",
    "monitor",
];
const MONITOR_KEYS: &[&str] = &["virtual_exec", "virtual_mmu"];

/// A value that may be written as a number or as a string.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a number or a string is needed")]
enum Number {
    Integer(i64),
    Float(f64),
    Text(String),
}

impl Number {
    fn text(&self) -> String {
        match self {
            Self::Integer(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings is needed")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "true, false or a string is needed")]
enum Switch {
    Bool(bool),
    Text(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MonitorTable {
    virtual_exec: Option<String>,
    virtual_mmu: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    image: Option<String>,
    kernel: Option<PathBuf>,
    initrd: Option<String>,
    append: Option<String>,
    disk: Option<OneOrMany>,
    cdrom: Option<OneOrMany>,
    #[serde(default)]
    snapshot: bool,
    share: Option<OneOrMany>,
    root: Option<String>,
    net: Option<OneOrMany>,
    forward: Option<OneOrMany>,
    memory: Option<Number>,
    cpus: Option<Number>,
    cpu: Option<String>,
    engine: Option<String>,
    mmu: Option<String>,
    rtc: Option<String>,
    balloon: Option<Switch>,
    vsock: Option<String>,
    shutdown_grace: Option<Number>,
    serial: Option<String>,
    vga: Option<String>,
    debugcon: Option<String>,
    #[serde(default)]
    isa_debug_exit: bool,
    #[serde(default)]
    no_reboot: bool,
    timeout: Option<Number>,
    name: Option<String>,
    control: Option<String>,
    metrics: Option<Number>,
    gdb: Option<Switch>,
    #[serde(default)]
    gdb_wait: bool,
    stats: Option<Switch>,
    trace: Option<String>,
    trace_range: Option<String>,
    #[serde(default)]
    perf_map: bool,
    jitdump: Option<PathBuf>,
    profile: Option<Number>,
    clock: Option<String>,
    #[serde(default)]
    monitor: MonitorTable,
}

/// Reads the file at `path`.
///
/// # Errors
/// One line: the file, the place in it, what is wrong, what to do.
pub fn read(path: &Path) -> Result<VmFlags, String> {
    let text = crate::prepare::open_input(path)
        .and_then(std::io::read_to_string)
        .map_err(|error| format!("cannot read {}: {error}; name a TOML file", path.display()))?;
    let base = path.parent().unwrap_or(Path::new(""));
    parse(&text, base).map_err(|error| format!("{}{error}", path.display()))
}

/// Parses the text of a file whose paths are relative to `base`. Errors begin with `:LINE: ` or `: `.
fn parse(text: &str, base: &Path) -> Result<VmFlags, String> {
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        format!(":{line}: {}", error.message().replace('\n', ", "))
    })?;
    unquote_dotted_keys(&mut table);
    check_keys(text, &table)?;
    let file: File = table.try_into().map_err(|error: toml::de::Error| {
        // The error displays as "MESSAGE\nin `KEY`\n".
        let shown = error.to_string();
        let key = shown.split('`').rev().nth(1).and_then(|path| path.rsplit('.').next());
        let key = key.filter(|key| KEYS.contains(key) || MONITOR_KEYS.contains(key));
        let key = key.unwrap_or_default();
        let reason = error.message().replace('\n', ", ");
        format!(
            "{} {reason}{}",
            place(text, key),
            if key.is_empty() { String::new() } else { format!(" in '{key}'; see trellis run --help") }
        )
    })?;
    flags(file, base, text)
}

/// `"monitor.virtual_exec" = …`, quoted, means the dotted key.
fn unquote_dotted_keys(table: &mut toml::Table) {
    for name in MONITOR_KEYS {
        if let Some(value) = table.remove(&format!("monitor.{name}"))
            && let toml::Value::Table(monitor) =
                table.entry("monitor").or_insert_with(|| toml::Value::Table(toml::Table::new()))
        {
            monitor.insert((*name).to_owned(), value);
        }
    }
}

/// Refuses keys that there are not, naming the nearest.
fn check_keys(text: &str, table: &toml::Table) -> Result<(), String> {
    let check = |key: &str, known: &[&str], prefix: &str| {
        if known.contains(&key) {
            return Ok(());
        }
        let spelled = key.replace('-', "_");
        let hint = suggest::nearest(&spelled, known.iter().copied()).map_or_else(
            || format!("; keys are {}", known.join(", ")),
            |name| format!("; did you mean '{prefix}{name}'?"),
        );
        Err(format!("{} there is no key '{prefix}{key}'{hint}", place(text, key)))
    };
    for (key, value) in table {
        check(key, KEYS, "")?;
        if let ("monitor", toml::Value::Table(monitor)) = (key.as_str(), value) {
            monitor.keys().try_for_each(|key| check(key, MONITOR_KEYS, "monitor."))?;
        }
    }
    Ok(())
}

/// `:LINE:` of the first line that speaks of `key`, or `:`.
fn place(text: &str, key: &str) -> String {
    let of_key = |line: &str| {
        let name = line.split(['=', '#']).next().unwrap_or_default();
        !key.is_empty() && name.split(['.', '"', '\'', '[', ']', ' ', '\t']).any(|part| part == key)
    };
    text.lines().position(of_key).map_or_else(|| ":".to_owned(), |line| format!(":{}:", line + 1))
}

/// Turns the file into flags, value by value.
fn flags(file: File, base: &Path, text: &str) -> Result<VmFlags, String> {
    fn value<T, V>(
        text: &str,
        key: &str,
        value: Option<V>,
        parse: impl Fn(V) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        value.map(parse).transpose().map_err(|reason| format!("{} {key}: {reason}", place(text, key)))
    }
    let choice = |name: &str| format!("{} {name}", place(text, name));
    let engine = value(text, "engine", file.engine, |name| parse_choice(&name))?;
    let exec = value(text, "virtual_exec", file.monitor.virtual_exec, |name| parse_choice(&name))?;
    let mmu: Option<MmuChoice> = value(text, "mmu", file.mmu, |name| parse_choice(&name))?;
    let virtual_mmu: Option<MmuChoice> =
        value(text, "virtual_mmu", file.monitor.virtual_mmu, |name| parse_choice(&name))?;
    if engine.is_some() && exec.is_some() {
        return Err(format!(
            "{}: 'engine' and 'monitor.virtual_exec' say the same; remove one",
            choice("engine")
        ));
    }
    if mmu.is_some() && virtual_mmu.is_some() {
        return Err(format!("{}: 'mmu' and 'monitor.virtual_mmu' say the same; remove one", choice("mmu")));
    }
    let disks = file.disk.map(OneOrMany::list).unwrap_or_default();
    let disks: Result<Vec<DiskSpec>, String> = disks.iter().map(|disk| relative_disk(base, disk)).collect();
    let cdroms = file.cdrom.map(OneOrMany::list).unwrap_or_default();
    let cdroms = cdroms.iter().map(|path| DiskSpec::cdrom(base.join(path)));
    let disks = disks.map(|disks| disks.into_iter().chain(cdroms).collect());
    let inside = InsideFlags {
        trace: value(text, "trace", file.trace, |name| parse_trace(&name))?,
        trace_range: value(text, "trace_range", file.trace_range, |range| parse_range(&range))?,
        perf_map: file.perf_map,
        jitdump: file.jitdump,
        profile: value(text, "profile", file.profile, |hz| inside::parse_hz(&hz.text()))?,
    };
    let extras = ExtraFlags {
        rtc: value(text, "rtc", file.rtc, |base| parse_rtc(&base))?,
        balloon: value(text, "balloon", file.balloon, |switch| match switch {
            Switch::Bool(false) => Ok(None),
            Switch::Bool(true) => parse_balloon("").map(Some),
            Switch::Text(text) => parse_balloon(&text).map(Some),
        })?
        .flatten(),
        vsock: value(text, "vsock", file.vsock, |vsock| Ok(parse_vsock(&vsock)?.relative_to(base)))?,
        shutdown_grace: value(text, "shutdown_grace", file.shutdown_grace, |time| parse_grace(&time.text()))?,
    };
    Ok(VmFlags {
        image: file.image,
        kernel: file.kernel.map(|path| base.join(path)),
        initrd: file.initrd.map(|initrd| relative_modules(base, &initrd)),
        append: file.append,
        disks: disks.map_err(|reason| format!("{} disk: {reason}", place(text, "disk")))?,
        snapshot: file.snapshot,
        shares: value(text, "share", file.share, |shares| relative_shares(base, shares))?.unwrap_or_default(),
        root: value(text, "root", file.root, |root| parse_root(&joined(base, &root)))?,
        net: net_flags(file.net, file.forward, base, text)?,
        memory_bytes: value(text, "memory", file.memory, |number| parse_memory(&number.text()))?,
        cpus: value(text, "cpus", file.cpus, |number| parse_cpus(&number.text()))?,
        cpu: value(text, "cpu", file.cpu, |name| parse_cpu(&name))?,
        engine: engine.or(exec.map(VirtualExec::into)),
        mmu: mmu.or(virtual_mmu),
        serial: value(text, "serial", file.serial, |name| relative_target(base, &name))?,
        vga: value(text, "vga", file.vga, |name| parse_choice(&name))?,
        debugcon: value(text, "debugcon", file.debugcon, |name| relative_target(base, &name))?,
        isa_debug_exit: file.isa_debug_exit,
        no_reboot: file.no_reboot,
        timeout_seconds: value(text, "timeout", file.timeout, |number| parse_timeout(&number.text()))?,
        name: value(text, "name", file.name, |name| control::parse_name(&name))?,
        control: value(text, "control", file.control, |target| relative_control(base, &target))?,
        metrics: value(text, "metrics", file.metrics, |place| metrics::parse_address(&place.text()))?,
        gdb: value(text, "gdb", file.gdb, |switch| relative_gdb(base, switch))?.flatten(),
        gdb_wait: file.gdb_wait,
        stats: value(text, "stats", file.stats, |switch| stats_of(base, switch))?.flatten(),
        extras,
        inside: inside.relative_to(base),
        clock: value(text, "clock", file.clock, |name| parse_choice(&name))?,
        save_at_marker: false,
    })
}

impl OneOrMany {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

fn net_flags(
    nets: Option<OneOrMany>,
    forwards: Option<OneOrMany>,
    base: &Path,
    text: &str,
) -> Result<NetFlags, String> {
    let nets = nets.map(OneOrMany::list).unwrap_or_default();
    let forwards = forwards.map(OneOrMany::list).unwrap_or_default();
    let nets = nets.iter().map(|net| Ok(parse_net(net)?.relative_to(base))).collect::<Result<_, String>>();
    let forwards = forwards.iter().map(|forward| parse_forward(forward)).collect::<Result<_, String>>();
    Ok(NetFlags {
        nets: nets.map_err(|reason| format!("{} net: {reason}", place(text, "net")))?,
        forwards: forwards.map_err(|reason| format!("{} forward: {reason}", place(text, "forward")))?,
    })
}

fn relative_disk(base: &Path, text: &str) -> Result<DiskSpec, String> {
    let text = if base.join(text).exists() { text } else { text.strip_prefix("path=").unwrap_or(text) };
    match base.join(text).to_str() {
        Some(joined) if !text.is_empty() => parse_disk(joined),
        _ => parse_disk(text),
    }
}

fn joined(base: &Path, text: &str) -> String {
    if text.is_empty() { String::new() } else { base.join(text).display().to_string() }
}

fn relative_shares(base: &Path, shares: OneOrMany) -> Result<Vec<ShareSpec>, String> {
    let shares = match shares {
        OneOrMany::One(share) => vec![share],
        OneOrMany::Many(shares) => shares,
    };
    shares.iter().map(|share| parse_share(&joined(base, share))).collect()
}

fn relative_target(base: &Path, text: &str) -> Result<CharTarget, String> {
    Ok(match parse_char_target(text)? {
        CharTarget::File(path) => CharTarget::File(base.join(path)),
        other => other,
    })
}

fn relative_control(base: &Path, text: &str) -> Result<ControlTarget, String> {
    Ok(match control::parse_target(text)? {
        ControlTarget::Path(path) => ControlTarget::Path(base.join(path)),
        other => other,
    })
}

fn relative_gdb(base: &Path, switch: Switch) -> Result<Option<GdbTarget>, String> {
    Ok(match switch {
        Switch::Bool(on) => on.then(GdbTarget::default),
        Switch::Text(text) => {
            let mut target = gdb::parse_target(&text)?;
            if let Place::Unix(path) = &mut target.place {
                *path = base.join(&*path);
            }
            Some(target)
        }
    })
}

/// Makes each file of `FILE ARGS,FILE ARGS` relative to `base`.
fn relative_modules(base: &Path, text: &str) -> String {
    if base.join(text).exists() {
        return base.join(text).display().to_string();
    }
    let modules = text.split(',').map(|module| base.join(module).display().to_string());
    modules.collect::<Vec<_>>().join(",")
}

fn stats_of(base: &Path, switch: Switch) -> Result<Option<StatsTarget>, String> {
    Ok(match switch {
        Switch::Bool(on) => on.then_some(StatsTarget::Print),
        Switch::Text(text) => Some(match parse_stats(&text)? {
            StatsTarget::File(path) => StatsTarget::File(base.join(path)),
            StatsTarget::Print => StatsTarget::Print,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{EngineChoice, VgaChoice};
    use vmm::DiskBus;

    fn parsed(text: &str) -> Result<VmFlags, String> {
        parse(text, Path::new("/vm"))
    }

    #[test]
    fn file_whole_becomes_flags() {
        let flags = parsed(
            "kernel = 'vmlinuz'\ninitrd = 'initrd'\nappend = 'console=ttyS0'\nmemory = '1G'\ncpus = 2\ncpu = 'v3'\n\
             disk = ['a.img', '/b.img,ro']\nserial = 'file:log'\nvga = 'text'\ntimeout = 1.5\nstats = true\n\
             monitor.virtual_exec = 'software'\nmonitor.virtual_mmu = 'automatic'\n",
        )
        .unwrap();
        assert_eq!(flags.kernel, Some("/vm/vmlinuz".into()));
        assert_eq!(flags.initrd.as_deref(), Some("/vm/initrd"));
        assert_eq!((flags.memory_bytes, flags.cpus), (Some(1 << 30), Some(2)));
        assert_eq!(flags.disks[0].path, Path::new("/vm/a.img"));
        assert_eq!(
            flags.disks[1],
            DiskSpec { path: "/b.img".into(), read_only: true, ..DiskSpec::default() }
        );
        let cdrom = parsed("disk = 'a.img,if=ahci'\ncdrom = 'c.iso'").unwrap();
        assert_eq!((cdrom.disks[0].bus, cdrom.disks[1].bus), (DiskBus::Ahci, DiskBus::Cdrom));
        assert_eq!(cdrom.disks[1].path, Path::new("/vm/c.iso"));
        assert_eq!(flags.serial, Some(CharTarget::File("/vm/log".into())));
        assert_eq!(flags.vga, Some(VgaChoice::Text));
        assert_eq!(flags.timeout_seconds, Some(1.5));
        assert_eq!((flags.engine, flags.mmu), (Some(EngineChoice::Software), Some(MmuChoice::Auto)));
        assert_eq!(flags.stats, Some(StatsTarget::Print));
    }

    #[test]
    fn monitor_keys_work_as_table_dotted_and_quoted() {
        for text in [
            "[monitor]\nvirtual_exec = 'hardware'",
            "monitor.virtual_exec = 'hardware'",
            "\"monitor.virtual_exec\" = 'hardware'",
        ] {
            assert_eq!(parsed(text).unwrap().engine, Some(EngineChoice::Hardware), "{text}");
        }
    }

    #[test]
    fn mistakes_are_one_line_with_place_and_advice() {
        let cases = [
            ("cpus = 1\nmemroy = '1G'", ":2: there is no key 'memroy'; did you mean 'memory'?"),
            ("monitor.virtual_exc = 'x'", "did you mean 'monitor.virtual_exec'"),
            ("no-reboot = true", "did you mean 'no_reboot'"),
            ("\ncpus = 1000", ":2: cpus: a machine cannot have 1000 CPUs"),
            ("memory = 0", "too little"),
            ("trace = 'fragment'", ":1: trace: 'fragment' is no level; did you mean 'fragments'"),
            ("trace_range = 'x'", "trace_range: 'x' is no range"),
            ("memory = []", "'memory'"),
            ("cpu = 3", "'cpu'"),
            ("no_reboot = 'yes'", "'no_reboot'"),
            ("monitor = 3", "monitor"),
            ("monitor.virtual_mmu = 'hardwre'", "did you mean 'hardware'"),
            ("engine = 'interp'\nmonitor.virtual_exec = 'software'", "remove one"),
            ("disk = ['a,rx']", "'rx'"),
            ("cpus = \n", ":1:"),
            ("this is not toml", ":1:"),
            ("\u{7f}\u{0}", ":1:"),
        ];
        for (text, expected) in cases {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn gdb_is_a_switch_or_a_place() {
        assert_eq!(parsed("gdb = true\ngdb_wait = true").unwrap().gdb, Some(GdbTarget::default()));
        assert_eq!(parsed("gdb = false").unwrap().gdb, None);
        let flags = parsed("gdb = './g'").unwrap();
        assert_eq!(flags.gdb.map(|gdb| gdb.place), Some(Place::Unix("/vm/./g".into())));
        assert!(parsed("\ngdb = 'x'").unwrap_err().starts_with(":2: gdb: 'x'"));
    }

    /// What the command line calls otherwise, or has for itself alone.
    #[test]
    fn every_option_of_a_machine_is_a_key() {
        use clap::{Args as _, Command};
        let command = crate::cli::MachineArgs::augment_args(Command::new("machine"));
        let names = command.get_arguments().filter(|argument| !argument.is_hide_set());
        let names: Vec<String> =
            names.filter_map(|argument| Some(argument.get_long()?.replace('-', "_"))).collect();
        assert!(names.len() > 30, "{names:?}");
        for name in &names {
            let known = match name.as_str() {
                // `monitor.virtual_exec`.
                "virtual_exec" => MONITOR_KEYS.contains(&"virtual_exec"),
                name => KEYS.contains(&name),
            };
            assert!(known, "there is no key for --{name}");
        }
        for key in KEYS.iter().filter(|key| !["image", "monitor"].contains(key)) {
            assert!(names.iter().any(|name| name == key), "there is no option for the key {key}");
        }
    }

    /// A key that is listed and not read would be an error, or lost.
    #[test]
    fn every_key_is_read() {
        for (key, value) in [
            ("image", "'debian'"),
            ("kernel", "'k'"),
            ("initrd", "'i'"),
            ("append", "'a'"),
            ("disk", "'d'"),
            ("snapshot", "true"),
            ("share", "'/tmp'"),
            ("root", "'/tmp'"),
            ("net", "'user'"),
            ("forward", "'tcp:1:1'"),
            ("memory", "'1G'"),
            ("cpus", "2"),
            ("cpu", "'max'"),
            ("engine", "'bt'"),
            ("mmu", "'software'"),
            ("rtc", "'base=localtime'"),
            ("balloon", "true"),
            ("vsock", "'socket=s'"),
            ("shutdown_grace", "1.5"),
            ("serial", "'none'"),
            ("vga", "'text'"),
            ("debugcon", "'stdio'"),
            ("isa_debug_exit", "true"),
            ("no_reboot", "true"),
            ("timeout", "1"),
            ("name", "'n'"),
            ("control", "'c'"),
            ("metrics", "9100"),
            ("gdb", "true"),
            ("gdb_wait", "true"),
            ("stats", "true"),
            ("trace", "'events'"),
            ("trace_range", "'1-2'"),
            ("perf_map", "true"),
            ("jitdump", "'.'"),
            ("profile", "100"),
            ("clock", "'icount'"),
            ("monitor", "{ virtual_exec = 'software' }"),
        ] {
            assert!(KEYS.contains(&key), "{key}");
            let flags = parsed(&format!("{key} = {value}")).unwrap_or_else(|error| panic!("{key}: {error}"));
            assert_ne!(flags, VmFlags::default(), "{key} says nothing");
        }
    }

    #[test]
    fn smaller_devices_are_described_as_on_the_command_line() {
        let flags =
            parsed("balloon = '1G,oom=off'\nvsock = 'cid=9,socket=s'\nshutdown_grace = 0").unwrap().extras;
        assert_eq!(flags.balloon, Some(parse_balloon("1G,oom=off").unwrap()));
        assert_eq!(flags.vsock.map(|vsock| (vsock.cid, vsock.socket)), Some((9, "/vm/s".into())));
        assert_eq!(flags.shutdown_grace, Some(std::time::Duration::ZERO));
        assert_eq!(parsed("balloon = false").unwrap().extras.balloon, None);
        assert!(parsed("\nrtc = 'base=ucc'").unwrap_err().starts_with(":2: rtc: 'ucc'"));
    }

    #[test]
    fn file_empty_says_nothing() {
        assert_eq!(parsed("").unwrap(), VmFlags::default());
    }

    #[test]
    fn file_missing_names_it() {
        assert!(read(Path::new("/nonexistent/vm.toml")).unwrap_err().contains("/nonexistent/vm.toml"));
    }
}

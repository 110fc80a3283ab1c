//! The user's end of the control socket: finds the machine that he means, asks it, says what came back.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Answer, Info, Request, directories, is_stale, own_directory, sockets};
use crate::suggest;

/// A machine answers in so long.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// One that is only listed should be quicker.
const LIST_LIMIT: Duration = Duration::from_secs(2);
/// The longest answer that is read.
const MAX_ANSWER_LEN: u64 = 16 << 20;

/// A connection to a machine.
struct Connection {
    name: String,
    stream: BufReader<UnixStream>,
}

impl Connection {
    fn open(name: &str, path: &Path, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self { name: name.to_owned(), stream: BufReader::new(stream) })
    }

    /// One request, one answer.
    fn ask(&mut self, request: &Request) -> Result<Answer, String> {
        let name = &self.name;
        let told = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("the machine '{name}' does not answer; end it with: trellis quit {name}")
            }
            _ => format!("the machine '{name}' has hung up: {error}"),
        };
        let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(told)?;
        let mut text = Vec::new();
        let mut limited = self.stream.by_ref().take(MAX_ANSWER_LEN);
        limited.read_until(b'\n', &mut text).map_err(told)?;
        if text.is_empty() {
            return Err(format!("the machine '{name}' has ended"));
        }
        let answer: Answer = serde_json::from_slice(&text)
            .map_err(|error| format!("the machine '{name}' answers nonsense: {error}"))?;
        if answer.ok {
            return Ok(answer);
        }
        Err(format!("the machine '{name}': {}", answer.error.as_deref().unwrap_or("no reason given")))
    }

    /// Waits until the machine's process has ended, and so its end of the socket.
    fn wait_end(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
            || matches!(self.stream.get_ref().take_error(), Ok(Some(_)))
    }
}

/// The sockets at which somebody listens; the others are removed.
fn running() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for directory in directories() {
        // One that belongs to somebody else is no business of ours.
        let Ok(lock) = own_directory_if_there(&directory) else { continue };
        // Unlocked, a machine may be starting: its new socket would look stale.
        let locked = lock.try_lock().is_ok();
        for (name, path) in sockets(&directory) {
            if !is_stale(&path) {
                found.push((name, path));
            } else if locked {
                // Somebody may have been quicker.
                let _ = std::fs::remove_file(path);
            }
        }
    }
    found
}

fn own_directory_if_there(directory: &Path) -> io::Result<std::fs::File> {
    std::fs::metadata(directory)?;
    own_directory(directory)
}

/// The machine that the user means.
fn find(wanted: Option<&str>) -> Result<Connection, String> {
    if let Some(path) = wanted.filter(|name| name.contains('/')) {
        return Connection::open(path, Path::new(path), ANSWER_LIMIT)
            .map_err(|error| format!("cannot reach a machine at {path}: {error}"));
    }
    let found = running();
    let (name, path) = choose(wanted, &found)?;
    Connection::open(name, path, ANSWER_LIMIT)
        .map_err(|error| format!("cannot reach the machine '{name}': {error}"))
}

/// The one of that name, or the only one.
fn choose<'a>(wanted: Option<&str>, found: &'a [(String, PathBuf)]) -> Result<&'a (String, PathBuf), String> {
    let names = || found.iter().map(|(name, _)| name.as_str());
    let all = || names().collect::<Vec<_>>().join(", ");
    match (wanted, found) {
        (_, []) => Err("no machine is running; start one with: trellis boot".to_owned()),
        (None, [only]) => Ok(only),
        (None, _) => Err(format!("several machines are running; name one of {}", all())),
        (Some(wanted), _) => found.iter().find(|(name, _)| name == wanted).ok_or_else(|| {
            let hint =
                suggest::did_you_mean(wanted, names()).unwrap_or_else(|| format!("; running: {}", all()));
            format!("no machine named '{}' is running{hint}", wanted.escape_debug())
        }),
    }
}

/// Asks the machine `wanted` for something and returns what is to be printed.
///
/// # Errors
/// One line.
pub fn ask(wanted: Option<&str>, request: &Request) -> Result<String, String> {
    let mut connection = find(wanted)?;
    let answer = connection.ask(request)?;
    match request {
        Request::Quit if !connection.wait_end() => {
            Err(format!("the machine '{}' was told to quit and still runs", connection.name))
        }
        Request::Type { text, serial } => {
            let all = if *serial { text.len() } else { text.chars().count() };
            let typed = answer.typed.unwrap_or_default();
            if typed < all {
                return Err(format!(
                    "the machine '{}' took {typed} of {all} characters; type the rest later",
                    connection.name
                ));
            }
            Ok(String::new())
        }
        _ => Ok(answer.text.unwrap_or_default()),
    }
}

/// The statistics of the machine `wanted` as JSON.
///
/// # Errors
/// One line.
pub fn stats_json(wanted: Option<&str>) -> Result<String, String> {
    let answer = find(wanted)?.ask(&Request::Stats)?;
    Ok(format!("{:#}\n", answer.stats.unwrap_or_default()))
}

/// A machine as [`survey`] found it: its name, what it is, its statistics; or why it did not say.
pub type Surveyed = (String, Result<(Info, serde_json::Value), String>);

/// What every running machine says of itself.
#[must_use]
pub fn survey() -> Vec<Surveyed> {
    let ask = |name: &str, path: &Path| {
        let opened = Connection::open(name, path, LIST_LIMIT);
        let mut connection = opened.map_err(|error| error.to_string())?;
        let info = connection.ask(&Request::Info)?.info.unwrap_or_default();
        Ok((info, connection.ask(&Request::Stats)?.stats.unwrap_or_default()))
    };
    running()
        .into_iter()
        .map(|(name, path)| {
            let said = ask(&name, &path);
            (name, said)
        })
        .collect()
}

/// The running machines, as a table or as JSON.
#[must_use]
pub fn list(json: bool) -> String {
    let infos: Vec<Info> = running().iter().map(|(name, path)| info(name, path)).collect();
    if json {
        return format!("{:#}\n", serde_json::json!(infos));
    }
    if infos.is_empty() {
        return "no machine is running; start one with: trellis boot\n".to_owned();
    }
    table(&infos)
}

/// What a machine says of itself; one that does not answer is listed by its name.
fn info(name: &str, path: &Path) -> Info {
    let asked = Connection::open(name, path, LIST_LIMIT)
        .map_err(|error| error.to_string())
        .and_then(|mut connection| connection.ask(&Request::Info));
    let unknown = || Info { name: name.to_owned(), guest: "(does not answer)".to_owned(), ..Info::default() };
    asked.ok().and_then(|answer| answer.info).unwrap_or_else(unknown)
}

fn table(infos: &[Info]) -> String {
    let width = infos.iter().map(|info| info.name.len()).max().unwrap_or(0).max(4);
    let mut text =
        format!("{:width$}  {:>7}  {:>4}  {:>10}  {:>8}  GUEST\n", "NAME", "PID", "CPUS", "MEMORY", "UP");
    for info in infos {
        let up = format!("{}:{:02}:{:02}", info.seconds / 3600, info.seconds / 60 % 60, info.seconds % 60);
        let memory = format!("{} MiB", info.memory_bytes >> 20);
        let state = if info.paused { " (paused)" } else { "" };
        text.push_str(&format!(
            "{:width$}  {:>7}  {:>4}  {memory:>10}  {up:>8}  {}{state}\n",
            info.name, info.pid, info.cpus, info.guest
        ));
    }
    text
}

/// Text with the escapes of `trellis type`: `\n` Enter, `\t` Tab, `\b` Backspace, `\e` Escape, `\\` a backslash.
///
/// # Errors
/// One line for another escape.
pub fn unescape(text: &str) -> Result<String, String> {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        plain.push(match character {
            '\\' => match characters.next() {
                Some('n' | 'r') => '\n',
                Some('t') => '\t',
                Some('b') => '\u{8}',
                Some('e') => '\u{1b}',
                Some('\\') => '\\',
                other => {
                    let other = other.map_or_else(String::new, |c| c.escape_debug().to_string());
                    return Err(format!("'\\{other}' stands for no key; there are \\n \\t \\b \\e \\\\"));
                }
            },
            other => other,
        });
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines(names: &[&str]) -> Vec<(String, PathBuf)> {
        names.iter().map(|name| ((*name).to_owned(), PathBuf::from(name))).collect()
    }

    #[test]
    fn machine_is_chosen_by_name_or_as_the_only_one() {
        let name = |wanted, names: &[&str]| choose(wanted, &machines(names)).map(|(name, _)| name.clone());
        assert_eq!(name(None, &["a"]).unwrap(), "a");
        assert_eq!(name(Some("b"), &["a", "b"]).unwrap(), "b");
        assert!(name(None, &[]).unwrap_err().contains("trellis boot"));
        assert!(name(Some("a"), &[]).unwrap_err().contains("no machine is running"));
        assert!(name(None, &["a", "b"]).unwrap_err().contains("a, b"));
        assert!(name(Some("debain"), &["debian", "xen"]).unwrap_err().contains("did you mean 'debian'"));
        assert!(name(Some("zzz"), &["debian", "xen"]).unwrap_err().contains("running: debian, xen"));
    }

    #[test]
    fn escapes_are_keys() {
        assert_eq!(unescape(r"root\n\t\e\\x").unwrap(), "root\n\t\u{1b}\\x");
        assert!(unescape(r"\q").unwrap_err().contains(r"\q"));
        assert!(unescape("\\").is_err());
    }

    #[test]
    fn table_lists_what_there_is() {
        let info = Info {
            name: "web".into(),
            seconds: 3725,
            paused: true,
            guest: "debian".into(),
            ..Info::default()
        };
        let text = table(&[info]);
        assert!(text.contains("1:02:05") && text.contains("debian (paused)"), "{text}");
    }
}

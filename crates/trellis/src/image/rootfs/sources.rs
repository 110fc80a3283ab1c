//! Where packages come from: the archives of this distribution among those that apt was refreshed from, as lines of
//! `sources.list` for this host and for the guest, and the proxies.
//!
//! A guest reaches this host's loopback at another address (docs/guide/network.md); archives and proxies there are written so.

use std::path::Path;
use std::process::Command;

use super::super::Sources;
use super::super::apt::Apt;
use super::super::error::{ImageError, IoContext as _};

/// This host, as a guest of the user network calls it.
const HOST_IN_GUEST: &str = "10.0.2.2";

/// One component of one suite of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    uri: String,
    suite: String,
    component: String,
}

/// A distribution's archives, and the way to them.
#[derive(Debug)]
pub(super) struct Archive {
    parts: Vec<Part>,
    /// `http` or `https`, and the proxy's URL.
    proxies: Vec<(String, String)>,
}

impl Archive {
    /// What `apt` was refreshed from, as far as it is the distribution's own.
    pub fn of(apt: &Apt, sources: &Sources) -> Result<Self, ImageError> {
        let text = apt.index_targets("$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)")?;
        let wanted = sources.distribution().name();
        let mut parts = parse_targets(&text, |origin| origin.eq_ignore_ascii_case(wanted));
        if parts.is_empty() {
            // A mirror of one's own may call itself what it likes.
            parts = parse_targets(&text, |_| matches!(sources, Sources::Mirror { .. }));
        }
        if parts.is_empty() {
            return Err(apt.no_archive(wanted));
        }
        Ok(Self { parts, proxies: host_proxies() })
    }

    /// The release: the suite that the others (`-updates`, `-security`) are named after.
    pub fn suite(&self) -> &str {
        let names = self.parts.iter().map(|part| part.suite.as_str());
        names.min_by_key(|name| name.len()).unwrap_or_default()
    }

    /// For mmdebstrap, on this host.
    pub fn host_lines(&self) -> String {
        let options = super::super::apt::signed_by();
        let line = |part: &Part| format!("deb {options}{} {} {}\n", part.uri, part.suite, part.component);
        self.parts.iter().map(line).collect()
    }

    /// For the guest's own apt.
    pub fn guest_lines(&self) -> String {
        let line = |part: &Part| {
            let (uri, off) = match seen_by_guest(&part.uri) {
                Some(uri) => (uri, ""),
                None => (part.uri.clone(), "# a directory of the host that built this: "),
            };
            format!("{off}deb {uri} {} {}\n", part.suite, part.component)
        };
        self.parts.iter().map(line).collect()
    }

    /// `apt.conf` lines for mmdebstrap.
    pub fn host_proxies(&self) -> Vec<String> {
        self.proxies.iter().map(|(scheme, url)| format!("Acquire::{scheme}::Proxy \"{url}\";")).collect()
    }

    /// The guest's `apt.conf`.
    pub fn guest_proxies(&self) -> String {
        let line = |(scheme, url): &(String, String)| {
            let url = seen_by_guest(url).unwrap_or_else(|| url.clone());
            format!("Acquire::{scheme}::Proxy \"{url}\";\n")
        };
        self.proxies.iter().map(line).collect()
    }
}

/// Lines of origin, address, suite and component, without repetition and in their order.
fn parse_targets(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let [origin, uri, suite, component] = fields[..] else { continue };
        let part = Part {
            uri: uri.trim_end_matches('/').to_owned(),
            suite: suite.to_owned(),
            component: component.to_owned(),
        };
        if wanted(origin) && !suite.is_empty() && !component.starts_with('$') && !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts
}

/// A URL as the guest has to write it; `None` for files of this host.
fn seen_by_guest(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    if !["http", "https", "ftp"].contains(&scheme) {
        return None;
    }
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (user, place) = authority.rsplit_once('@').map_or(("", authority), |(user, place)| (user, place));
    let host_end = if place.starts_with('[') {
        place.find(']').map_or(place.len(), |at| at + 1)
    } else {
        place.find(':').unwrap_or(place.len())
    };
    let (host, port) = place.split_at(host_end);
    let here = host == "localhost" || host.starts_with("127.") || host == "[::1]";
    if !here {
        return Some(url.to_owned());
    }
    let at = if user.is_empty() { "" } else { "@" };
    Some(format!("{scheme}://{user}{at}{HOST_IN_GUEST}{port}{path}"))
}

/// The proxies that this host's apt goes through.
fn host_proxies() -> Vec<(String, String)> {
    let mut proxies = Vec::new();
    for scheme in ["http", "https"] {
        let output = Command::new("apt-config")
            .args(["shell", "PROXY", &format!("Acquire::{scheme}::Proxy")])
            .output()
            .at("running", Path::new("apt-config"));
        let of_apt = output.ok().and_then(|output| shell_value(&String::from_utf8_lossy(&output.stdout)));
        let of_environment = std::env::var(format!("{scheme}_proxy")).ok();
        // "DIRECT" is apt's word for none (apt-transport-http(1)).
        let url = of_apt.or(of_environment).filter(|url| url.contains("://") && !url.contains(['"', '\n']));
        proxies.extend(url.map(|url| (scheme.to_owned(), url)));
    }
    proxies
}

/// The value of `PROXY='…'`.
fn shell_value(text: &str) -> Option<String> {
    let value = text.trim().strip_prefix("PROXY='")?.strip_suffix('\'')?;
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Archive {
        let text = "Debian|http://m.example/debian/|bookworm-updates|main\nDebian|http://m.example/debian/|bookworm|main\n\
                    Debian|http://m.example/debian/|bookworm|main\nOthers|https://o.example/|x|main\n\
                    Debian|http://localhost:3142/s/|bookworm-security|main\n";
        Archive {
            parts: parse_targets(text, |origin| origin == "Debian"),
            proxies: vec![("http".to_owned(), "http://127.0.0.1:3128/".to_owned())],
        }
    }

    #[test]
    fn only_the_distribution_s_own_archives_are_taken_once() {
        let archive = archive();
        assert_eq!(archive.parts.len(), 3);
        assert_eq!(archive.suite(), "bookworm");
        assert!(archive.host_lines().contains("http://localhost:3142/s bookworm-security main\n"));
    }

    #[test]
    fn loopback_of_the_host_has_another_address_in_the_guest() {
        assert!(archive().guest_lines().contains("deb http://10.0.2.2:3142/s bookworm-security main\n"));
        assert_eq!(archive().guest_proxies(), "Acquire::http::Proxy \"http://10.0.2.2:3128/\";\n");
        let seen = |url| seen_by_guest(url).unwrap_or_default();
        assert_eq!(seen("http://u:p@[::1]:80/x"), "http://u:p@10.0.2.2:80/x");
        assert_eq!(seen("https://localhost.example/"), "https://localhost.example/");
        assert_eq!(seen("file:///srv/debian"), "");
    }

    #[test]
    fn shell_words_of_apt_config_are_read() {
        assert_eq!(shell_value("PROXY='http://p:1'\n").as_deref(), Some("http://p:1"));
        assert_eq!(shell_value(""), None);
    }
}

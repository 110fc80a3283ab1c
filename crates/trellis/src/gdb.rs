//! `--gdb`: where the gdb stub listens. The stub itself is `vmm::gdb`.

use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::path::PathBuf;

use vmm::gdb::{Arch, Listener};

use crate::control::server::bind_path;

/// Without a place: where QEMU's `-s` listens, but for this host only.
const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 1234;

/// A place to listen at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Host (a name or an address) and port; 0 is any that is free.
    Tcp(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// The value of `--gdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GdbTarget {
    /// Where gdb is waited for.
    pub place: Place,
    /// What the guest is shown as; without it, as what it executes when gdb attaches.
    pub arch: Option<Arch>,
}

impl Default for GdbTarget {
    fn default() -> Self {
        Self { place: Place::Tcp(DEFAULT_HOST.to_owned(), DEFAULT_PORT), arch: None }
    }
}

/// Parses `PORT`, `HOST:PORT`, `[IPV6]:PORT`, QEMU's `tcp:HOST:PORT`, a path with a slash in it, `unix:PATH`; each with
/// `,arch=i386` or `,arch=x86-64` behind it, or that alone.
///
/// # Errors
/// One line: what is wrong, and an example.
pub fn parse_target(text: &str) -> Result<GdbTarget, String> {
    let (place, arch) = match text.rsplit_once("arch=") {
        Some((place, arch)) if place.is_empty() || place.ends_with(',') => {
            (place.trim_end_matches(','), Some(parse_arch(arch)?))
        }
        _ => (text, None),
    };
    let place = if place.is_empty() { GdbTarget::default().place } else { parse_place(place)? };
    Ok(GdbTarget { place, arch })
}

fn parse_arch(text: &str) -> Result<Arch, String> {
    match text {
        "x86-64" | "x86_64" | "amd64" => Ok(Arch::X86_64),
        "i386" => Ok(Arch::I386),
        _ => Err(format!("gdb knows no architecture '{text}' of ours; give arch=x86-64 or arch=i386")),
    }
}

fn parse_place(text: &str) -> Result<Place, String> {
    const EXAMPLE: &str =
        "give a port as in 1234, an address as in 127.0.0.1:1234, or a path as in ./gdb.sock";
    match text.strip_prefix("unix:") {
        Some("") => return Err(format!("'unix:' needs a path; {EXAMPLE}")),
        Some(path) => return Ok(Place::Unix(PathBuf::from(path))),
        None if text.contains('/') => return Ok(Place::Unix(PathBuf::from(text))),
        None => {}
    }
    let address = text.strip_prefix("tcp:").unwrap_or(text);
    let (host, port) = address.rsplit_once(':').unwrap_or((DEFAULT_HOST, address));
    let port = port.parse().map_err(|_| format!("'{text}' is no place for gdb to connect to; {EXAMPLE}"))?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bare.is_none() && host.contains(':') {
        return Err(format!("the IPv6 address in '{text}' needs brackets; write [{host}]:{port}"));
    }
    let host = bare.unwrap_or(host);
    let host = if host.is_empty() { DEFAULT_HOST } else { host };
    Ok(Place::Tcp(host.to_owned(), port))
}

/// A place that is listened at. Dropping it removes a socket's file.
#[derive(Debug)]
pub struct Bound {
    listener: Option<Listener>,
    /// What gdb's `target remote` takes.
    pub address: String,
    file: Option<PathBuf>,
}

impl Bound {
    /// The listener, once.
    pub const fn take(&mut self) -> Option<Listener> {
        self.listener.take()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            // Somebody may have been tidier than we.
            let _gone = std::fs::remove_file(path);
        }
    }
}

/// Listens at `place`.
///
/// # Errors
/// One line: where, why not, what to do.
pub fn bind(place: &Place) -> Result<Bound, String> {
    match place {
        Place::Tcp(host, port) => {
            let (listener, address) = bind_tcp(host, *port).map_err(|error| {
                let hint = match error.kind() {
                    io::ErrorKind::AddrInUse => "; give another port with --gdb=PORT, or 0 for a free one",
                    io::ErrorKind::PermissionDenied => "; give a port above 1023 with --gdb=PORT",
                    _ => "; give another address with --gdb=HOST:PORT",
                };
                format!("cannot wait for gdb at {host}:{port}: {}{hint}", plain(&error))
            })?;
            if !address.ip().is_loopback() {
                crate::terminal::tell(&format!(
                    "trellis: whoever reaches {address} can read and change the guest; gdb's protocol knows no password\n"
                ));
            }
            Ok(Bound { listener: Some(Listener::Tcp(listener)), address: address.to_string(), file: None })
        }
        Place::Unix(path) => {
            let listener = bind_path(path, "socket for gdb")?;
            let address = path.display().to_string();
            Ok(Bound { listener: Some(Listener::Unix(listener)), address, file: Some(path.clone()) })
        }
    }
}

fn bind_tcp(host: &str, port: u16) -> io::Result<(TcpListener, std::net::SocketAddr)> {
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    let listener = TcpListener::bind(addresses.as_slice())?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// The system's words without its number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Place {
        Place::Tcp(host.to_owned(), port)
    }

    #[test]
    fn places_are_ports_addresses_and_paths() {
        let cases = [
            ("", tcp("127.0.0.1", 1234)),
            ("2000", tcp("127.0.0.1", 2000)),
            (":2000", tcp("127.0.0.1", 2000)),
            ("tcp::2000", tcp("127.0.0.1", 2000)),
            ("localhost:0", tcp("localhost", 0)),
            ("[::1]:2000", tcp("::1", 2000)),
            ("./gdb.sock", Place::Unix("./gdb.sock".into())),
            ("unix:gdb", Place::Unix("gdb".into())),
        ];
        for (text, place) in cases {
            assert_eq!(parse_target(text), Ok(GdbTarget { place: place.clone(), arch: None }), "{text}");
            let with_arch =
                if text.is_empty() { "arch=i386".to_owned() } else { format!("{text},arch=i386") };
            let wanted = GdbTarget { place, arch: Some(Arch::I386) };
            assert_eq!(parse_target(&with_arch), Ok(wanted), "{with_arch}");
        }
    }

    #[test]
    fn nonsense_is_refused_in_one_line_with_an_example() {
        for text in ["x", "host:", "host:70000", "host:-1", "::1:2000", "unix:", "1234,arch=arm", "1234,arm"]
        {
            let error = parse_target(text).unwrap_err();
            assert!(
                !error.contains('\n') && error.contains("give") || error.contains("write"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn place_taken_or_impossible_is_told_with_advice() {
        let first = bind(&tcp("127.0.0.1", 0)).unwrap();
        let port = first.address.rsplit_once(':').unwrap().1.parse().unwrap();
        let error = bind(&tcp("127.0.0.1", port)).unwrap_err();
        assert!(
            error.contains("in use") && error.contains("another port") && !error.contains('\n'),
            "{error}"
        );
        let error = bind(&tcp("192.0.2.1", 1)).unwrap_err();
        assert!(error.contains("192.0.2.1") && !error.contains('\n'), "{error}");
        let error = bind(&Place::Unix("/nonexistent/gdb".into())).unwrap_err();
        assert!(error.contains("/nonexistent/gdb") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn socket_is_removed_at_the_end_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gdb");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = bind(&Place::Unix(path.clone())).unwrap();
        assert!(bind(&Place::Unix(path.clone())).unwrap_err().contains("running program"));
        drop(bound);
        assert!(!path.exists());
    }
}

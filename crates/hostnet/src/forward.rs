//! What comes in: ports of the host that lead into the guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

/// Of what a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// `tcp:2222:22`: a port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Protocol.
    pub protocol: Protocol,
    /// The address of the host that listens.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The guest's port.
    pub guest_port: u16,
}

impl Forward {
    /// Parses `tcp:PORT:GUESTPORT` or `tcp:ADDRESS:PORT:GUESTPORT`, and `udp` likewise; without an address only this host
    /// itself reaches the guest.
    ///
    /// # Errors
    /// One line with the form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "'{text}' is no forward; write tcp:2222:22 (port of the host, port of the guest), udp:…, or tcp:0.0.0.0:2222:22"
            )
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let (address, port) = match rest.rsplit_once(':') {
            Some((address, port)) => (address.trim_matches(['[', ']']).parse().map_err(|_| wrong())?, port),
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        let number = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0).ok_or_else(wrong);
        Ok(Self { protocol, address, port: number(port)?, guest_port: number(guest)? })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.protocol == Protocol::Tcp { "tcp" } else { "udp" };
        match self.address {
            IpAddr::V4(address) => write!(f, "{protocol}:{address}:{}:{}", self.port, self.guest_port),
            IpAddr::V6(address) => write!(f, "{protocol}:[{address}]:{}:{}", self.port, self.guest_port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_is_read_as_it_is_shown() {
        let forward = Forward::parse("tcp:2222:22").unwrap();
        assert_eq!(forward.to_string(), "tcp:127.0.0.1:2222:22");
        for text in ["udp:0.0.0.0:53:5353", "tcp:[::1]:80:8080"] {
            assert_eq!(Forward::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn forward_nonsense_is_one_line() {
        for text in ["", "tcp", "tcp:1", "tcp:0:22", "tcp:1:65536", "sctp:1:2", "tcp:x:1:2", "tcp:1:2:3:4"] {
            let error = Forward::parse(text).unwrap_err();
            assert!(error.contains("tcp:2222:22") && !error.contains('\n'), "{text}: {error}");
        }
    }
}

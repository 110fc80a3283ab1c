//! Which name server the host asks.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::DNS_PORT;

/// The host's first name server; its own, if none is named. Read anew each time, since laptops move.
pub(super) fn current() -> SocketAddr {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    SocketAddr::new(first(&text).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), DNS_PORT)
}

/// The first `nameserver` (resolv.conf(5)) that has an address we can use: one with a zone is of a link.
fn first(text: &str) -> Option<IpAddr> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_usable_name_server_is_taken() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver fe80::1%eth0\n nameserver\t10.0.0.1 \nnameserver 8.8.8.8\n";
        assert_eq!(first(text), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(first("nameserver ::1"), Some("::1".parse().unwrap()));
        assert_eq!(first("options edns0"), None);
    }
}

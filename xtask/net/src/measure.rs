//! What is measured, and what a guest's output says about it.

use std::fmt;

use anyhow::Context as _;

/// What iperf3 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// From the guest, over TCP.
    TcpUp,
    /// To it.
    TcpDown,
    /// Datagrams from the guest, as many as go.
    UdpUp,
    /// Datagrams to it, 1 Gbit/s of them.
    UdpDown,
}

impl Load {
    /// All.
    pub const ALL: [Self; 4] = [Self::TcpUp, Self::TcpDown, Self::UdpUp, Self::UdpDown];

    /// iperf3's options.
    pub const fn options(self) -> &'static str {
        match self {
            Self::TcpUp => "",
            Self::TcpDown => "-R",
            Self::UdpUp => "-u -b 0 -l 1460",
            Self::UdpDown => "-u -b 1G -l 1460 -R",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::TcpUp => "tcp up",
            Self::TcpDown => "tcp down",
            Self::UdpUp => "udp up",
            Self::UdpDown => "udp down",
        }
    }
}

/// The network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plug {
    /// User-mode, to this host.
    User,
    /// A socket, to another guest.
    Link,
    /// A TAP interface, and this host's address on it.
    Tap(String, String),
}

impl Plug {
    /// Parses `NAME,ADDRESS`.
    ///
    /// # Errors
    /// Another form.
    pub fn parse_tap(text: &str) -> anyhow::Result<Self> {
        let (name, address) = text.split_once(',').context("--tap is NAME,ADDRESS, as in tap0,10.9.1.1")?;
        let _: std::net::Ipv4Addr = address.parse().context("--tap: the address is IPv4's")?;
        Ok(Self::Tap(name.to_owned(), address.to_owned()))
    }
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Case {
    /// The card.
    pub model: &'static str,
    /// What is set otherwise than by default.
    pub switches: &'static str,
    /// What is sent.
    pub load: Load,
    /// Over what.
    pub plug: Plug,
}

impl Case {
    /// The card, with its switches.
    pub fn card(&self) -> String {
        if self.switches.is_empty() {
            self.model.to_owned()
        } else {
            format!("{}, {}", self.model, self.switches)
        }
    }

    /// Load and network.
    pub fn what(&self) -> String {
        let over = match self.plug {
            Plug::User => "",
            Plug::Link => ", guest to guest",
            Plug::Tap(..) => ", TAP",
        };
        format!("{}{over}", self.load.name())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.card(), self.what())
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// What arrived, per second.
    pub mbits: Option<f64>,
    /// Accesses to the card's registers.
    pub touches: u64,
    /// Its interrupts.
    pub interrupts: u64,
    /// Frames that the guest sent.
    pub packets_out: u64,
    /// And got.
    pub packets_in: u64,
}

impl Outcome {
    /// Both ways together.
    pub const fn packets(&self) -> u64 {
        self.packets_out + self.packets_in
    }

    /// Reads what iperf3 and `--stats` say.
    pub fn parse(text: &str) -> Self {
        let mut outcome = Self::default();
        for line in text.lines() {
            let line = line.trim();
            if line.ends_with("receiver") {
                outcome.mbits = rate(line).or(outcome.mbits);
            }
            let is_card = line.starts_with("virtio-net.0: ") || line.starts_with("e1000.0: ");
            let Some((_, counters)) = line.split_once(": ").filter(|_| is_card) else { continue };
            for (name, value) in counters.split(", ").filter_map(|counter| counter.split_once(' ')) {
                let Ok(value) = value.parse() else { continue };
                match name {
                    "touches" => outcome.touches = value,
                    "interrupts" => outcome.interrupts = value,
                    "packets_out" => outcome.packets_out = value,
                    "packets_in" => outcome.packets_in = value,
                    _ => {}
                }
            }
        }
        outcome
    }
}

/// `… 4.32 Gbits/sec …`.
fn rate(line: &str) -> Option<f64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| word.ends_with("bits/sec"))?;
    let value: f64 = words.get(at.checked_sub(1)?)?.parse().ok()?;
    Some(match words[at].chars().next()? {
        'G' => value * 1e3,
        'M' => value,
        'K' => value / 1e3,
        _ => value / 1e6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_iperf3_and_the_statistics_say_is_read() {
        let text = "[  5]   0.00-2.00   sec  5.00 GBytes  21.5 Gbits/sec    9             sender\r\n\
                    [  5]   0.00-2.01   sec  5.00 GBytes  21.4 Gbits/sec                  receiver\r\n\
                    [  5]   0.00-2.01   sec   117 MBytes   488 Mbits/sec  0.044 ms  312/15623 (2%)  receiver\r\n\
                    virtio-net.0: notifications 7, interrupts 9, touches 38, packets_out 20, bytes_out 5, packets_in 4\n";
        let outcome = Outcome::parse(text);
        assert_eq!(outcome.mbits, Some(488.0));
        assert_eq!((outcome.touches, outcome.interrupts, outcome.packets()), (38, 9, 24));
        assert_eq!(Outcome::parse("iperf3: error\n"), Outcome::default());
    }

    #[test]
    fn tap_is_a_name_and_an_address() {
        assert_eq!(
            Plug::parse_tap("t0,10.9.1.1").unwrap(),
            Plug::Tap("t0".to_owned(), "10.9.1.1".to_owned())
        );
        assert!(Plug::parse_tap("t0").is_err() && Plug::parse_tap("t0,x").is_err());
    }
}

//! `--net` and `--forward`: network cards as the user writes them, and what they are plugged into.

use std::path::{Path, PathBuf};

use hostnet::link::Link;
use hostnet::tap::Tap;
use hostnet::user::{UserNet, UserOptions};
use hostnet::{Backend, Forward, NetError};
use vmm::{CardModel, CardOptions, Doorbell, Mac, NetConfig};

use crate::options::ClockChoice;
use crate::prepare::PrepareError;
use crate::suggest;

const USAGE: &str = "write --net user, --net tap=NAME, --net socket=PATH or --net none; and behind it ,mac=52:54:00:12:34:56 ,model=e1000";
/// The most cards of a machine: PCI slots and sense.
const MAX_CARDS: usize = 8;
/// What may stand behind a kind.
const OPTIONS: [&str; 9] =
    ["mac", "model", "forward", "loopback", "restrict", "combine", "suppress", "offload", "doorbell"];
/// The card of a user network, as QEMU has it; nobody else is on that network.
const USER_MAC: Mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// What a card is plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetKind {
    /// Nothing: no card.
    None,
    /// A network of its own behind this host.
    User {
        /// Ports of the host that lead in.
        forwards: Vec<Forward>,
        /// The guest reaches this host's own services.
        loopback: bool,
        /// The guest reaches nothing beyond this host.
        restrict: bool,
    },
    /// An interface of the host.
    Tap(String),
    /// Another machine.
    Socket(PathBuf),
}

/// One `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// What it is plugged into.
    pub kind: NetKind,
    /// Its address, if one is given.
    pub mac: Option<Mac>,
    /// Its kind.
    pub model: CardModel,
    /// How it deals with its driver.
    pub options: CardOptions,
}

/// All of `--net` and `--forward`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetFlags {
    /// Cards.
    pub nets: Vec<NetSpec>,
    /// Ports of the first user network.
    pub forwards: Vec<Forward>,
}

impl NetSpec {
    /// Paths become relative to `base`.
    #[must_use]
    pub fn relative_to(mut self, base: &Path) -> Self {
        if let NetKind::Socket(path) = &mut self.kind {
            *path = base.join(&path);
        }
        self
    }

    fn is_user(&self) -> bool {
        matches!(self.kind, NetKind::User { .. })
    }
}

impl NetFlags {
    /// `self` where it says something, `file` elsewhere: cards of the command line replace those of the file.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        let nets = if self.nets.is_empty() { file.nets } else { self.nets };
        Self { nets, forwards: file.forwards.into_iter().chain(self.forwards).collect() }
    }

    /// A user network where nothing is said: for guests that expect one.
    #[must_use]
    pub fn or_user(mut self) -> Self {
        if self.nets.is_empty() && self.forwards.is_empty() {
            self.nets.extend(parse_net("user").ok());
        }
        self
    }

    /// Whether a card is an e1000, which not every kernel has a driver of.
    #[must_use]
    pub fn has_e1000(&self) -> bool {
        self.nets.iter().any(|net| net.model == CardModel::E1000)
    }

    /// Makes what the cards are plugged into.
    ///
    /// # Errors
    /// What makes no sense together, and what this host cannot give.
    pub fn plug_in(&self, clock: ClockChoice) -> Result<Vec<NetConfig>, PrepareError> {
        let cards = self.cards().map_err(PrepareError::Usage)?;
        if !cards.is_empty() && clock == ClockChoice::Icount {
            return Err(PrepareError::Usage(
                "--clock icount is reproducible, which a network is not; give --net none or --clock host"
                    .to_owned(),
            ));
        }
        let plug = |(index, card): (usize, &NetSpec)| {
            let backend = backend(&card.kind).map_err(|error| PrepareError::Failure(error.to_string()))?;
            let mac = card.mac.unwrap_or_else(|| address(card, index));
            Ok(NetConfig { model: card.model, options: card.options, ..NetConfig::new(mac, backend) })
        };
        cards.iter().enumerate().map(plug).collect()
    }

    /// The cards, with `--forward` where it belongs.
    fn cards(&self) -> Result<Vec<NetSpec>, String> {
        let mut cards = self.nets.clone();
        if cards.iter().any(|card| card.kind == NetKind::None)
            && (cards.len() > 1 || !self.forwards.is_empty())
        {
            return Err("--net none means no network; remove it, or the other --net and --forward".to_owned());
        }
        cards.retain(|card| card.kind != NetKind::None);
        if cards.len() > MAX_CARDS {
            return Err(format!("a machine has at most {MAX_CARDS} network cards, not {}", cards.len()));
        }
        if !self.forwards.is_empty() && !cards.iter().any(NetSpec::is_user) {
            if !cards.is_empty() {
                return Err("--forward is of --net user; add --net user, or remove --forward".to_owned());
            }
            cards.push(parse_net("user")?);
        }
        let first = cards.iter_mut().find(|card| card.is_user());
        if let Some(NetSpec { kind: NetKind::User { forwards, .. }, .. }) = first {
            forwards.extend(&self.forwards);
        }
        Ok(cards)
    }
}

fn backend(kind: &NetKind) -> Result<Box<dyn Backend>, NetError> {
    Ok(match kind {
        NetKind::Tap(name) => Box::new(Tap::new(name)?),
        NetKind::Socket(path) => Box::new(Link::new(path)?),
        NetKind::User { forwards, loopback, restrict } => {
            let (loopback, restrict) = (*loopback, *restrict);
            Box::new(UserNet::new(&UserOptions { forwards: forwards.clone(), loopback, restrict })?)
        }
        NetKind::None => Box::new(UserNet::new(&UserOptions::default())?),
    })
}

/// The address of a card that was given none: always the same on a user network, chance where others may be.
fn address(card: &NetSpec, index: usize) -> Mac {
    let mut mac = USER_MAC;
    if card.is_user() {
        mac[5] = mac[5].wrapping_add(u8::try_from(index).unwrap_or(0));
        return mac;
    }
    let mut chance = [0; 3];
    // Without randomness the user gives an address where two meet.
    let _ = rustix::rand::getrandom(&mut chance, rustix::rand::GetRandomFlags::empty());
    mac[3..].copy_from_slice(&chance);
    mac
}

/// Parses `user[,forward=…][,loopback=off]`, `tap=NAME`, `socket=PATH`, `none`, each with `[,mac=…][,model=…]` and switches.
///
/// # Errors
/// One line for what there is not.
pub fn parse_net(text: &str) -> Result<NetSpec, String> {
    let mut words = text.split(',');
    let (kind, value) = split(words.next().unwrap_or_default());
    let named = |what: &str| {
        let missing = || format!("--net {kind} needs a {what}; write --net {kind}={what}");
        value.filter(|value| !value.is_empty()).ok_or_else(missing)
    };
    let kind = match kind {
        "none" | "user" if value.is_some() => return Err(format!("'{text}' is no network; {USAGE}")),
        "none" => NetKind::None,
        "user" => NetKind::User { forwards: Vec::new(), loopback: true, restrict: false },
        "tap" => NetKind::Tap(named("NAME")?.to_owned()),
        "socket" => NetKind::Socket(PathBuf::from(named("PATH")?)),
        other => {
            let hint = suggest::did_you_mean(other, ["user", "tap", "socket", "none"]);
            return Err(format!(
                "there is no network '{other}'{}",
                hint.unwrap_or_else(|| format!("; {USAGE}"))
            ));
        }
    };
    let mut spec = NetSpec { kind, mac: None, model: CardModel::default(), options: CardOptions::default() };
    words.try_for_each(|word| set_option(&mut spec, word))?;
    Ok(spec)
}

fn split(word: &str) -> (&str, Option<&str>) {
    word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)))
}

fn set_option(spec: &mut NetSpec, word: &str) -> Result<(), String> {
    let (name, value) = split(word);
    let value = value.unwrap_or_default();
    match (name, &mut spec.kind) {
        ("mac", _) => spec.mac = Some(parse_mac(value)?),
        ("model", _) => spec.model = parse_model(value)?,
        ("combine", _) => spec.options.combine = switch(name, value)?,
        ("suppress", _) => spec.options.suppress = switch(name, value)?,
        ("offload", _) => spec.options.offload = switch(name, value)?,
        ("doorbell", _) => {
            spec.options.doorbell = match value {
                "thread" => Doorbell::Thread,
                "vcpu" => Doorbell::Vcpu,
                _ => return Err(format!("doorbell is thread or vcpu, not '{value}'")),
            };
        }
        ("forward", NetKind::User { forwards, .. }) => forwards.push(Forward::parse(value)?),
        ("loopback", NetKind::User { loopback, .. }) => *loopback = switch(name, value)?,
        ("restrict", NetKind::User { restrict, .. }) => *restrict = switch(name, value)?,
        ("forward" | "loopback" | "restrict", _) => {
            return Err(format!("{name} is an option of --net user only"));
        }
        _ => {
            let hint = suggest::did_you_mean(name, OPTIONS);
            return Err(format!(
                "a network has no option '{name}'{}",
                hint.unwrap_or_else(|| format!("; {USAGE}"))
            ));
        }
    }
    Ok(())
}

fn switch(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{name} is on or off, not '{value}'")),
    }
}

fn parse_model(text: &str) -> Result<CardModel, String> {
    match text {
        "virtio" | "virtio-net" | "virtio-net-pci" => Ok(CardModel::Virtio),
        "e1000" | "e1000-82540em" => Ok(CardModel::E1000),
        _ => {
            let hint = suggest::did_you_mean(text, ["virtio", "e1000"]);
            let hint = hint.unwrap_or_else(|| "; write model=virtio or model=e1000".to_owned());
            Err(format!("there is no network card '{text}'{hint}"))
        }
    }
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let wrong = || format!("'{text}' is no address of a card; write mac=52:54:00:12:34:56");
    let mut mac: Mac = [0; 6];
    let parts: Vec<&str> = text.split(':').collect();
    if parts.len() != mac.len() {
        return Err(wrong());
    }
    for (to, part) in mac.iter_mut().zip(parts) {
        let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *to = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(wrong)?;
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(format!(
            "'{text}' is the address of a group or of nobody; its first number must be even"
        ));
    }
    Ok(mac)
}

/// Parses `tcp:2222:22`.
///
/// # Errors
/// One line with the form.
pub fn parse_forward(text: &str) -> Result<Forward, String> {
    Forward::parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_their_options_are_read() {
        let user =
            parse_net("user,forward=tcp:2222:22,forward=udp:53:5353,loopback=off,mac=52:54:00:00:00:01");
        let user = user.unwrap();
        assert_eq!(user.mac, Some([0x52, 0x54, 0, 0, 0, 1]));
        let NetKind::User { forwards, loopback: false, restrict: false } = user.kind else {
            panic!("{user:?}")
        };
        assert_eq!(forwards.len(), 2);
        assert_eq!(parse_net("tap=tap0").unwrap().kind, NetKind::Tap("tap0".to_owned()));
        assert_eq!(parse_net("none").unwrap().kind, NetKind::None);
        let card = parse_net("tap=x,model=e1000,combine=off,suppress=off,offload=off,doorbell=vcpu").unwrap();
        let options =
            CardOptions { combine: false, suppress: false, offload: false, doorbell: Doorbell::Vcpu };
        assert_eq!((card.model, card.options), (CardModel::E1000, options));
        let socket = parse_net("socket=a/b").unwrap().relative_to(Path::new("/x"));
        assert_eq!(socket.kind, NetKind::Socket("/x/a/b".into()));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("", "--net user"),
            ("usr", "did you mean 'user'"),
            ("tap", "--net tap=NAME"),
            ("socket=", "--net socket=PATH"),
            ("user=x", "no network"),
            ("user,mac=1", "52:54:00:12:34:56"),
            ("user,mac=53:54:00:12:34:56", "even"),
            ("user,mac=+2:54:00:12:34:56", "52:54:00:12:34:56"),
            ("user,forward=22", "tcp:2222:22"),
            ("user,forwrd=tcp:1:1", "did you mean 'forward'"),
            ("tap=x,forward=tcp:1:1", "--net user only"),
            ("user,loopback=maybe", "on or off"),
            ("user,combine=no", "on or off"),
            ("user,doorbell=off", "thread or vcpu"),
            ("user,model=e100", "did you mean 'e1000'"),
            ("user,model=rtl8139", "model=virtio"),
        ] {
            let error = parse_net(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn forward_alone_means_a_user_network() {
        let flags = |nets: &[&str]| NetFlags {
            nets: nets.iter().map(|net| parse_net(net).unwrap()).collect(),
            forwards: vec![parse_forward("tcp:2222:22").unwrap()],
        };
        let cards = flags(&[]).cards().unwrap();
        assert!(
            matches!(&cards[..], [NetSpec { kind: NetKind::User { forwards, .. }, .. }] if forwards.len() == 1)
        );
        assert_eq!(flags(&["tap=x", "user"]).cards().unwrap().len(), 2);
        assert!(flags(&["tap=x"]).cards().unwrap_err().contains("--net user"));
        assert!(flags(&["none"]).cards().unwrap_err().contains("--net none"));
        assert!(NetFlags::default().cards().unwrap().is_empty());
    }
}

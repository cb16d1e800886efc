//! Which mode an interface gets, and why not a better one: a decision over facts. Gathering them is `facts.rs`.
//!
//! ```text
//!   zero-copy  --no-->  native  --no-->  generic  --no-->  off        each "no" with its reason, as text
//! ```
//!
//! What is known beforehand to be wrong is not tried: an interface that only passes on what another one carries,
//! packets that fit no frame, somebody else's XDP program. `auto` also leaves virtual devices alone, whose offloads an
//! XDP program would take away.

use std::{fmt, str::FromStr};

use super::socket::{MAX_SOCKETS, OpenError, Sizes};

/// What the operator asks for (`--fast-path`, FIREZONE_FAST_PATH).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The best that the interface can do.
    #[default]
    Auto,
    /// Nothing.
    Off,
    /// Exactly this, also on virtual devices.
    Exactly(Mode),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Self::Auto,
            "off" => Self::Off,
            "generic" => Self::Exactly(Mode::Generic),
            "native" => Self::Exactly(Mode::Native),
            "zerocopy" => Self::Exactly(Mode::ZeroCopy),
            _ => return Err(format!("must be auto, off, generic, native or zerocopy, not {text:?}")),
        })
    }
}

/// How an interface is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// The program runs in the driver, which reads and writes our frames.
    ZeroCopy,
    /// The program runs in the driver, frames are copied.
    Native,
    /// The program runs in the stack, frames are copied.
    Generic,
}

impl Mode {
    /// The metric label, and what `--fast-path` takes.
    pub fn label(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zerocopy",
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ZeroCopy => "native with zero-copy",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// What is known about an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Frames have Ethernet headers.
    pub ethernet: bool,
    /// It is up and has a carrier.
    pub up: bool,
    /// What kind of virtual device it is; `None` for a NIC.
    pub kind: Option<String>,
    /// It is part of another device (a bond, a bridge).
    pub enslaved: bool,
    /// The longest IP packet, in bytes.
    pub mtu: usize,
    /// Its receive queues.
    pub queues: u32,
    /// The XDP program that is attached and is not ours, by its id.
    pub program: Option<u32>,
    /// There are VLAN devices on top of it.
    pub has_vlans: bool,
    /// It takes VLAN tags off before anybody sees the frame; `None` if it does not say.
    pub strips_vlan: Option<bool>,
    /// The stack merges what arrives (GRO), or the device does.
    pub merges: bool,
}

impl Facts {
    /// What in `new` makes another probe necessary; `None` if what was found then still holds.
    pub fn change(&self, new: &Self) -> Option<&'static str> {
        let changes = [
            (self.index != new.index, "it is another device"),
            (self.up != new.up, if new.up { "its link is up" } else { "its link is down" }),
            (self.mtu != new.mtu, "its MTU has changed"),
            (self.queues != new.queues, "its queues have changed"),
            (self.merges != new.merges, "its GRO was switched"),
            (self.enslaved != new.enslaved, "it has joined or left another device"),
            (
                (self.has_vlans, self.strips_vlan) != (new.has_vlans, new.strips_vlan),
                "its VLANs have changed",
            ),
        ];
        changes.into_iter().find(|(changed, _)| *changed).map(|(_, text)| text)
    }
}

/// Why a mode was not used.
#[derive(Debug)]
pub enum Refusal {
    /// This mode does not work; the next one may.
    Mode(String),
    /// No mode will.
    Interface(String),
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Self {
        let text = error.to_string();
        match error {
            OpenError::NoZeroCopy | OpenError::Other { .. } => Self::Mode(text),
            _ => Self::Interface(text),
        }
    }
}

/// What an interface got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `None`: everything goes through the kernel's sockets.
    pub mode: Option<Mode>,
    /// Why not a better mode, from the best on; a `None` stands for all that are left.
    pub reasons: Vec<(Option<Mode>, String)>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Some(mode) => write!(f, "{mode}")?,
            None => f.write_str("off")?,
        }
        for (i, (mode, reason)) in self.reasons.iter().enumerate() {
            f.write_str(if i == 0 { " (" } else { "; " })?;
            if let Some(mode) = mode {
                write!(f, "not {mode}: ")?;
            }
            f.write_str(reason)?;
        }
        if self.reasons.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

/// Tries modes from the best on, those that make sense; `attempt` attaches the program and opens the sockets.
pub fn probe(wanted: Wanted, facts: &Facts, mut attempt: impl FnMut(Mode) -> Result<(), Refusal>) -> Outcome {
    let mut reasons = Vec::new();
    if let Some(reason) = refusal(wanted, facts) {
        return Outcome { mode: None, reasons: vec![(None, reason)] };
    }
    let modes: &[Mode] = match &wanted {
        Wanted::Exactly(mode) => std::slice::from_ref(mode),
        _ => &[Mode::ZeroCopy, Mode::Native, Mode::Generic],
    };
    for mode in modes {
        if *mode == Mode::Generic && facts.merges {
            let name = &facts.name;
            let reason = format!(
                "GRO merges datagrams before such a program sees them; `ethtool -K {name} gro off` leaves them apart"
            );
            reasons.push((Some(*mode), reason));
            continue;
        }
        match attempt(*mode) {
            Ok(()) => return Outcome { mode: Some(*mode), reasons },
            Err(Refusal::Mode(reason)) => reasons.push((Some(*mode), reason)),
            Err(Refusal::Interface(reason)) => {
                reasons.push((None, reason));
                break;
            }
        }
    }
    Outcome { mode: None, reasons }
}

/// Why nothing is tried.
fn refusal(wanted: Wanted, facts: &Facts) -> Option<String> {
    let Facts { name, kind, mtu, .. } = facts;
    // What carries nothing by itself: a program there would see frames too late, too early or twice.
    const RIDERS: [&str; 10] =
        ["bridge", "bond", "team", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "vrf", "hsr"];
    let kind = kind.as_deref();
    if wanted == Wanted::Off {
        return Some("switched off".to_owned());
    }
    if let Some(kind) = kind.filter(|kind| RIDERS.contains(kind)) {
        return Some(format!(
            "{name} is a {kind} device; only a device that carries the route itself can be used"
        ));
    }
    if !facts.ethernet {
        return Some(format!("{name} has no Ethernet headers"));
    }
    if facts.enslaved {
        return Some(format!("{name} is part of another device"));
    }
    if let Some(id) = facts.program {
        return Some(format!(
            "another XDP program (id {id}) is attached to {name}; `bpftool prog show id {id}` says which, \
             and `ip link set dev {name} xdp off` removes it"
        ));
    }
    if Sizes::plan(MAX_SOCKETS, *mtu).is_none() {
        return Some(format!("packets with an MTU of {mtu} bytes fit no frame"));
    }
    if facts.has_vlans && facts.strips_vlan != Some(false) {
        return Some(format!(
            "{name} has VLANs and takes their tags off; `ethtool -K {name} rxvlan off` leaves them on"
        ));
    }
    if !facts.up {
        return Some(format!("the link of {name} is down"));
    }
    if facts.queues == 0 {
        return Some(format!("{name} does not say how many queues it has"));
    }
    match kind {
        Some(kind) if wanted == Wanted::Auto => {
            Some(format!("{name} is a {kind} device, whose own offloads are faster"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic() -> Facts {
        Facts {
            name: "eth0".to_owned(),
            index: 2,
            ethernet: true,
            up: true,
            kind: None,
            enslaved: false,
            mtu: 1500,
            queues: 4,
            program: None,
            has_vlans: false,
            strips_vlan: Some(true),
            merges: false,
        }
    }

    fn no_mode(mode: Mode) -> Result<(), Refusal> {
        Err(Refusal::Mode(format!("{mode} does not work")))
    }

    #[test]
    fn words_are_what_the_operator_may_say() {
        let table = [
            ("auto", Ok(Wanted::Auto)),
            ("off", Ok(Wanted::Off)),
            ("generic", Ok(Wanted::Exactly(Mode::Generic))),
            ("native", Ok(Wanted::Exactly(Mode::Native))),
            ("zerocopy", Ok(Wanted::Exactly(Mode::ZeroCopy))),
            ("Auto", Err("must be auto, off, generic, native or zerocopy, not \"Auto\"".to_owned())),
            ("", Err("must be auto, off, generic, native or zerocopy, not \"\"".to_owned())),
        ];
        for (word, expect) in table {
            assert_eq!(word.parse::<Wanted>(), expect, "{word}");
        }
    }

    #[test]
    fn each_step_down_has_its_reason() {
        use Mode::{Generic, Native, ZeroCopy};
        // The best that works, what is asked for -> what it becomes
        let table = [
            (Some(ZeroCopy), Wanted::Auto, "native with zero-copy"),
            (
                Some(Native),
                Wanted::Auto,
                "native (not native with zero-copy: native with zero-copy does not work)",
            ),
            (
                Some(Generic),
                Wanted::Auto,
                "generic (not native with zero-copy: native with zero-copy does not work; \
                 not native: native does not work)",
            ),
            (
                None,
                Wanted::Auto,
                "off (not native with zero-copy: native with zero-copy does not work; \
                 not native: native does not work; not generic: generic does not work)",
            ),
            (Some(ZeroCopy), Wanted::Off, "off (switched off)"),
            (Some(ZeroCopy), Wanted::Exactly(Generic), "generic"),
            (Some(Native), Wanted::Exactly(Native), "native"),
            (
                Some(Native),
                Wanted::Exactly(ZeroCopy),
                "off (not native with zero-copy: native with zero-copy does not work)",
            ),
        ];
        for (works, wanted, expect) in table {
            let attempt = |mode| if works.is_some_and(|best| mode >= best) { Ok(()) } else { no_mode(mode) };
            assert_eq!(probe(wanted, &nic(), attempt).to_string(), expect, "{works:?} {wanted:?}");
        }
    }

    #[test]
    fn a_program_behind_gro_is_not_tried() {
        let facts = Facts { merges: true, ..nic() };
        let gro = "GRO merges datagrams before such a program sees them; `ethtool -K eth0 gro off` leaves them apart";
        for (wanted, expect) in [
            (Wanted::Exactly(Mode::Generic), format!("off (not generic: {gro})")),
            (
                Wanted::Auto,
                format!(
                    "off (not native with zero-copy: native with zero-copy does not work; \
                     not native: native does not work; not generic: {gro})"
                ),
            ),
        ] {
            let attempt = |mode| if mode == Mode::Generic { Ok(()) } else { no_mode(mode) };
            assert_eq!(probe(wanted, &facts, attempt).to_string(), expect);
        }
        assert_eq!(probe(Wanted::Auto, &facts, |_| Ok(())).mode, Some(Mode::ZeroCopy));
    }

    #[test]
    fn what_no_mode_can_cure_ends_the_search() {
        let mut tried = Vec::new();
        let outcome = probe(Wanted::Auto, &nic(), |mode| {
            tried.push(mode);
            match mode {
                Mode::ZeroCopy => Err(OpenError::NoZeroCopy.into()),
                _ => Err(OpenError::Taken(3).into()),
            }
        });
        assert_eq!(tried, [Mode::ZeroCopy, Mode::Native]);
        assert_eq!(
            outcome.to_string(),
            "off (not native with zero-copy: the driver has no zero-copy mode for AF_XDP; \
             queue 3 has AF_XDP sockets of another program)"
        );
    }

    #[test]
    fn what_cannot_work_is_not_tried() {
        let native = Wanted::Exactly(Mode::Native);
        let kind = |kind: &str| Facts { kind: Some(kind.to_owned()), ..nic() };
        let rider = "device; only a device that carries the route itself can be used";
        let vlans = Facts { has_vlans: true, ..nic() };
        // Facts, what is asked for -> the beginning of the reason, or nothing
        let table = [
            (nic(), Wanted::Auto, None),
            (
                kind("veth"),
                Wanted::Auto,
                Some("eth0 is a veth device, whose own offloads are faster".to_owned()),
            ),
            (
                kind("tun"),
                Wanted::Auto,
                Some("eth0 is a tun device, whose own offloads are faster".to_owned()),
            ),
            (kind("veth"), native, None),
            (kind("bridge"), native, Some(format!("eth0 is a bridge {rider}"))),
            (kind("bond"), native, Some(format!("eth0 is a bond {rider}"))),
            (kind("vlan"), Wanted::Auto, Some(format!("eth0 is a vlan {rider}"))),
            (kind("macvlan"), native, Some(format!("eth0 is a macvlan {rider}"))),
            (Facts { ethernet: false, ..nic() }, native, Some("eth0 has no Ethernet headers".to_owned())),
            (Facts { enslaved: true, ..nic() }, native, Some("eth0 is part of another device".to_owned())),
            (
                Facts { program: Some(12), ..nic() },
                native,
                Some(
                    "another XDP program (id 12) is attached to eth0; `bpftool prog show id 12` says which, \
                     and `ip link set dev eth0 xdp off` removes it"
                        .to_owned(),
                ),
            ),
            (Facts { mtu: 3822, ..nic() }, Wanted::Auto, None),
            (
                Facts { mtu: 9000, ..nic() },
                native,
                Some("packets with an MTU of 9000 bytes fit no frame".to_owned()),
            ),
            (
                vlans.clone(),
                native,
                Some(
                    "eth0 has VLANs and takes their tags off; `ethtool -K eth0 rxvlan off` leaves them on"
                        .to_owned(),
                ),
            ),
            (Facts { strips_vlan: Some(false), ..vlans }, native, None),
            (Facts { up: false, ..nic() }, native, Some("the link of eth0 is down".to_owned())),
            (
                Facts { queues: 0, ..nic() },
                native,
                Some("eth0 does not say how many queues it has".to_owned()),
            ),
            (Facts { mtu: 9000, ..nic() }, Wanted::Off, Some("switched off".to_owned())),
        ];
        for (facts, wanted, expect) in table {
            let mut tried = false;
            let outcome = probe(wanted, &facts, |_| {
                tried = true;
                Ok(())
            });
            assert_eq!(tried, expect.is_none(), "{facts:?}");
            assert_eq!(outcome.mode.is_some(), tried);
            assert_eq!(outcome.reasons.into_iter().map(|(_, reason)| reason).next(), expect, "{facts:?}");
        }
    }

    #[test]
    fn what_changes_on_an_interface_is_looked_at_again() {
        let table = [
            (nic(), None),
            (Facts { program: Some(7), ..nic() }, None),
            (Facts { up: false, ..nic() }, Some("its link is down")),
            (Facts { mtu: 9000, ..nic() }, Some("its MTU has changed")),
            (Facts { queues: 8, ..nic() }, Some("its queues have changed")),
            (Facts { merges: true, ..nic() }, Some("its GRO was switched")),
            (Facts { enslaved: true, ..nic() }, Some("it has joined or left another device")),
            (Facts { has_vlans: true, ..nic() }, Some("its VLANs have changed")),
            (Facts { index: 3, ..nic() }, Some("it is another device")),
        ];
        for (new, expect) in table {
            assert_eq!(nic().change(&new), expect, "{new:?}");
        }
        assert_eq!(Facts { up: false, ..nic() }.change(&nic()), Some("its link is up"));
    }
}

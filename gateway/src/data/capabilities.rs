//! What of the kernel's batching and steering may be used: all, unless an operator forbids some of it to find a fault;
//! and what of it is used.

use std::fmt::Write as _;

use anyhow::{Result, bail};

/// The variable that holds the words, separated by commas.
pub const VARIABLE: &str = "FIREZONE_DISABLE";

macro_rules! capabilities {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// One thing that the kernel may do for us.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Capability { $($(#[doc = $doc])+ $name,)+ }

        impl Capability {
            /// Every capability, in the order they are reported.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Its name in [`VARIABLE`] and in the log.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }
        }
    };
}

capabilities! {
    /// Virtio headers on the TUN device: TCP super-packets both ways.
    TunOffload = "tun-offload",
    /// UDP super-packets towards the TUN device; needs [`Capability::TunOffload`] and Linux 6.2.
    TunUso = "tun-uso",
    /// Received datagrams merged by the kernel.
    UdpGro = "udp-gro",
    /// Several datagrams of one route in one send.
    UdpGso = "udp-gso",
    /// Sends of several routes in one system call.
    Sendmmsg = "sendmmsg",
    /// A BPF program that brings each client's datagrams to its worker; needs several workers.
    ReuseportSteering = "reuseport-steering",
    /// A BPF program that brings packets for each client to its worker; needs several workers.
    TunSteering = "tun-steering",
}

/// What may be used; whether the kernel offers it is another question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// One bit for each that is forbidden.
    forbidden: u8,
}

const _: () = assert!(Capability::ALL.len() <= u8::BITS as usize);

impl Capabilities {
    /// Nothing is forbidden.
    #[cfg(test)]
    pub const ALL: Self = Self { forbidden: 0 };

    /// All but what FIREZONE_DISABLE names.
    ///
    /// # Errors
    /// A word that names nothing.
    pub fn from_env() -> Result<Self> {
        Self::without(&std::env::var(VARIABLE).unwrap_or_default())
    }

    /// All but what `words` names.
    ///
    /// # Errors
    /// A word that names nothing.
    pub fn without(words: &str) -> Result<Self> {
        let mut forbidden = 0;
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let Some(capability) = Capability::ALL.iter().find(|capability| capability.word() == word) else {
                let known: Vec<_> = Capability::ALL.iter().map(|capability| capability.word()).collect();
                let known = known.join(", ");
                bail!(
                    "{VARIABLE} must be a list of words out of {known}, separated by commas; {word:?} is none"
                );
            };
            forbidden |= capability.bit();
        }
        Ok(Self { forbidden })
    }

    /// Whether `capability` may be used.
    pub const fn allow(self, capability: Capability) -> bool {
        self.forbidden & capability.bit() == 0
    }
}

impl Capability {
    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What is in use, and why not the rest.
#[derive(Debug)]
pub struct InUse {
    allowed: Capabilities,
    missing: Vec<(Capability, String)>,
}

/// Why most capabilities are missing that nobody forbade.
pub const NOT_OFFERED: &str = "not offered by the kernel";

impl InUse {
    /// Everything that is allowed.
    pub fn new(allowed: Capabilities) -> Self {
        Self { allowed, missing: Vec::new() }
    }

    /// `capability` turned out not to be there, for this reason. The first reason counts.
    pub fn missing(&mut self, capability: Capability, why: impl Into<String>) {
        if self.has(capability) {
            self.missing.push((capability, why.into()));
        }
    }

    /// Whether it is in use.
    pub fn has(&self, capability: Capability) -> bool {
        self.allowed.allow(capability) && self.why(capability).is_none()
    }

    fn why(&self, capability: Capability) -> Option<&str> {
        if capability == Capability::TunUso && !self.has(Capability::TunOffload) {
            return Some("needs tun-offload");
        }
        self.missing.iter().find(|(missing, _)| *missing == capability).map(|(_, why)| &**why)
    }

    /// What is allowed and not in use, and why.
    pub fn lacking(&self) -> impl Iterator<Item = (Capability, &str)> {
        let allowed = Capability::ALL.iter().filter(|capability| self.allowed.allow(**capability));
        allowed.filter_map(|capability| Some((*capability, self.why(*capability)?)))
    }

    /// One line: each capability, whether it is used, and why not.
    pub fn describe(&self) -> String {
        let mut line = String::new();
        for &capability in Capability::ALL {
            let comma = if line.is_empty() { "" } else { ", " };
            let word = capability.word();
            // Writing to a string does not fail.
            let _ = match (self.allowed.allow(capability), self.why(capability)) {
                (false, _) => write!(line, "{comma}{word} off (by {VARIABLE})"),
                (true, Some(why)) => write!(line, "{comma}{word} off ({why})"),
                (true, None) => write!(line, "{comma}{word} on"),
            };
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_forbid_and_unknown_ones_are_an_error() {
        let table: [(&str, &[Capability]); 5] = [
            ("", &[]),
            (" , ", &[]),
            ("tun-uso", &[Capability::TunUso]),
            ("udp-gso, tun-steering", &[Capability::UdpGso, Capability::TunSteering]),
            ("sendmmsg,", &[Capability::Sendmmsg]),
        ];
        for (words, forbidden) in table {
            let allowed = Capabilities::without(words).unwrap();
            for capability in Capability::ALL {
                assert_eq!(allowed.allow(*capability), !forbidden.contains(capability), "{words:?}");
            }
        }
        assert_eq!(
            Capabilities::without("udp-gro,gso").unwrap_err().to_string(),
            "FIREZONE_DISABLE must be a list of words out of tun-offload, tun-uso, udp-gro, udp-gso, sendmmsg, \
             reuseport-steering, tun-steering, separated by commas; \"gso\" is none"
        );
    }

    #[test]
    fn line_says_why_something_is_off() {
        let mut in_use = InUse::new(Capabilities::without("udp-gso,tun-steering").unwrap());
        in_use.missing(Capability::UdpGro, NOT_OFFERED);
        in_use.missing(Capability::ReuseportSteering, "one worker");
        in_use.missing(Capability::TunSteering, "one worker");
        assert_eq!(
            in_use.describe(),
            "tun-offload on, tun-uso on, udp-gro off (not offered by the kernel), udp-gso off (by FIREZONE_DISABLE), \
             sendmmsg on, reuseport-steering off (one worker), tun-steering off (by FIREZONE_DISABLE)"
        );
        let mut in_use = InUse::new(Capabilities::ALL);
        in_use.missing(Capability::TunOffload, NOT_OFFERED);
        assert!(in_use.describe().starts_with(
            "tun-offload off (not offered by the kernel), tun-uso off (needs tun-offload), udp-gro on"
        ));
    }
}

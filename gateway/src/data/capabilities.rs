//! What of the kernel's batching may be used: all, unless an operator forbids some of it to find a fault.
//!
//! | word | forbids |
//! |---|---|
//! | `tun-offload` | virtio headers on the TUN device: TCP super-packets both ways, and with them `tun-uso` |
//! | `tun-uso` | UDP super-packets towards the TUN device |
//! | `udp-gro` | received datagrams merged by the kernel |
//! | `udp-gso` | several datagrams in one send |

use anyhow::{Result, bail};

/// The variable that holds the words, separated by commas.
pub const VARIABLE: &str = "FIREZONE_DISABLE";

/// What may be used; whether the kernel offers it is another question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// `tun-offload`
    pub tun_offload: bool,
    /// `tun-uso`
    pub tun_uso: bool,
    /// `udp-gro`
    pub udp_gro: bool,
    /// `udp-gso`
    pub udp_gso: bool,
}

impl Capabilities {
    /// Nothing is forbidden.
    pub const ALL: Self = Self { tun_offload: true, tun_uso: true, udp_gro: true, udp_gso: true };

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
        let mut left = Self::ALL;
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "tun-offload" => left.tun_offload = false,
                "tun-uso" => left.tun_uso = false,
                "udp-gro" => left.udp_gro = false,
                "udp-gso" => left.udp_gso = false,
                _ => bail!(
                    "{VARIABLE} must be a list of tun-offload, tun-uso, udp-gro and udp-gso, separated by commas; \
                     {word:?} is none of them"
                ),
            }
        }
        Ok(left)
    }

    /// One line: each capability, whether it is used, and why not. `offered` is what the kernel agreed to.
    pub fn describe(self, offered: Self) -> String {
        let of = |name, allowed: bool, offered: bool| match (allowed, offered) {
            (false, _) => format!("{name} off (by {VARIABLE})"),
            (true, false) => format!("{name} off (not offered by the kernel)"),
            (true, true) => format!("{name} on"),
        };
        let uso = match (self.tun_uso, self.tun_offload) {
            (true, false) => "tun-uso off (needs tun-offload)".to_owned(),
            _ => of("tun-uso", self.tun_uso, offered.tun_uso),
        };
        [
            of("tun-offload", self.tun_offload, offered.tun_offload),
            uso,
            of("udp-gro", self.udp_gro, offered.udp_gro),
            of("udp-gso", self.udp_gso, offered.udp_gso),
        ]
        .join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_forbid_and_unknown_ones_are_an_error() {
        let all = Capabilities::ALL;
        let table = [
            ("", all),
            (" , ", all),
            ("tun-uso", Capabilities { tun_uso: false, ..all }),
            ("udp-gso, udp-gro", Capabilities { udp_gro: false, udp_gso: false, ..all }),
            ("tun-offload,", Capabilities { tun_offload: false, ..all }),
        ];
        for (words, expect) in table {
            assert_eq!(Capabilities::without(words).unwrap(), expect, "{words:?}");
        }
        assert_eq!(
            Capabilities::without("udp-gro,gso").unwrap_err().to_string(),
            "FIREZONE_DISABLE must be a list of tun-offload, tun-uso, udp-gro and udp-gso, separated by commas; \
             \"gso\" is none of them"
        );
    }

    #[test]
    fn line_says_why_something_is_off() {
        let offered = Capabilities { udp_gro: false, ..Capabilities::ALL };
        assert_eq!(
            Capabilities::without("udp-gso").unwrap().describe(offered),
            "tun-offload on, tun-uso on, udp-gro off (not offered by the kernel), udp-gso off (by FIREZONE_DISABLE)"
        );
        assert_eq!(
            Capabilities::without("tun-offload").unwrap().describe(Capabilities::ALL),
            "tun-offload off (by FIREZONE_DISABLE), tun-uso off (needs tun-offload), udp-gro on, udp-gso on"
        );
    }
}

//! Names of DNS resources: what clients assign, what control knows of them, and what workers are told (dns.md section 5,
//! packets.md sections 5.1 and 6.2). Types only: nothing in here looks anything up.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::Deserialize;

use crate::{addr::is_resource_proxy, ids::ResourceId};

/// A host name in canonical form: lower-case ASCII, no dot at the end, 1 to 253 characters in labels of 1 to 63, each
/// character printable and no backslash, so that a name is what it looks like (RFC 1035 sections 2.3.4 and 5.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainName(Arc<str>);

impl DomainName {
    /// The most characters of a name without the dot at its end: 255 bytes on the wire (RFC 1035 section 2.3.4).
    pub const MAX_LEN: usize = 253;
    /// The most characters of a label.
    pub const MAX_LABEL: usize = 63;

    /// Reads a name in presentation format, in any case, with or without a dot at its end. `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let is_label = |label: &str| {
            (1..=Self::MAX_LABEL).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
        };
        (text.len() <= Self::MAX_LEN && text.split('.').all(is_label))
            .then(|| Self(text.to_ascii_lowercase().into()))
    }

    /// The text, without a dot at its end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A client maps proxy addresses to a name (`AssignedIps`, packets.md section 6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignedIps {
    /// The DNS resource that the name is to belong to.
    pub resource: ResourceId,
    /// The name as the client wrote it, without a dot at its end: the answer repeats it.
    pub said: Arc<str>,
    /// The same name, to compare.
    pub domain: DomainName,
    /// Ascending, each once. Only addresses of the proxy ranges: any other would let the client reach that very address
    /// by the filters of a DNS resource. Perhaps none.
    pub proxies: Vec<IpAddr>,
}

impl AssignedIps {
    /// Reads the JSON of a control packet. Members may come in any order, unknown ones are ignored. `None` if it is
    /// malformed, by its name too.
    #[must_use]
    pub fn parse(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Said<'a> {
            resource: ResourceId,
            #[serde(borrow)]
            domain: Cow<'a, str>,
            proxy_ips: Vec<IpAddr>,
        }
        let Said { resource, domain, mut proxy_ips } = serde_json::from_slice(json).ok()?;
        proxy_ips.retain(|ip| is_resource_proxy(*ip));
        proxy_ips.sort_unstable();
        proxy_ips.dedup();
        Some(Self {
            resource,
            domain: DomainName::parse(&domain)?,
            said: domain.strip_suffix('.').unwrap_or(&domain).into(),
            proxies: proxy_ips,
        })
    }
}

/// What a worker is told of one client's names: all of it, every time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// Ascending by name. An unchanged one stays the same `Arc`.
    pub domains: Arc<[Arc<Domain>]>,
    /// The latest [`Answer::KEPT`], serials ascending.
    pub answers: Arc<[Answer]>,
}

/// One name that a client has assigned proxy addresses to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// The name.
    pub name: DomainName,
    /// The DNS resources it was assigned under, ascending; not all of them need be authorised still.
    pub resources: Box<[ResourceId]>,
    /// Ascending: each proxy address and what stands behind it; `None` if the name has no address of that family. Of one
    /// client's domains no two have the same proxy address.
    pub proxies: Box<[(IpAddr, Option<IpAddr>)]>,
}

/// What a client is to hear about a name (`DomainStatus`, packets.md section 6.2). Each is sent once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Higher than that of every earlier answer of control, to whomever: a worker sends what is above the last it sent.
    pub serial: u64,
    /// The resource the client named.
    pub resource: ResourceId,
    /// [`AssignedIps::said`].
    pub said: Arc<str>,
    /// The name is translated; if not, the client drops what it has for it.
    pub active: bool,
}

impl Answer {
    /// How many of a client's answers are kept for its worker. A client may ask 20 times a second, and a worker drains
    /// its commands many times a second; one whose answer was lost asks again.
    pub const KEPT: usize = 64;
}

/// What became of a look-up, by family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Of A records.
    pub v4: Lookup<Ipv4Addr>,
    /// Of AAAA records.
    pub v6: Lookup<Ipv6Addr>,
}

/// What became of the look-up of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup<A> {
    /// The addresses; none for NXDOMAIN and NODATA.
    Answer(Vec<A>),
    /// SERVFAIL, REFUSED, no nameserver to be reached: nothing is known.
    Failed,
    /// No answer within 10 s (dns.md section 5.2).
    TimedOut,
}

impl<A> Lookup<A> {
    /// The same, of what `of` makes of each address; those it makes nothing of are left out.
    #[must_use]
    pub fn filter_map<B>(self, of: impl FnMut(A) -> Option<B>) -> Lookup<B> {
        match self {
            Self::Answer(ips) => Lookup::Answer(ips.into_iter().filter_map(of).collect()),
            Self::Failed => Lookup::Failed,
            Self::TimedOut => Lookup::TimedOut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_canonical_or_refused() {
        let label = "a".repeat(63);
        let longest = [&label[..], &label, &label, &label[..61]].join(".");
        let dotted = format!("{longest}.");
        let too_long = format!("{longest}a");
        let long_label = format!("{label}a.net");
        let table: [(&str, Option<&str>); 22] = [
            ("git.example.net", Some("git.example.net")),
            ("git.example.net.", Some("git.example.net")),
            ("GIT.Example.NET", Some("git.example.net")),
            ("x", Some("x")),
            ("xn--bcher-kva.example", Some("xn--bcher-kva.example")),
            ("_sip._tcp.example.net", Some("_sip._tcp.example.net")),
            ("\"odd\"!.example", Some("\"odd\"!.example")),
            (&longest, Some(&longest)),
            (&dotted, Some(&longest)),
            (&too_long, None),
            (&long_label, None),
            ("", None),
            (".", None),
            ("..", None),
            (".example.net", None),
            ("git..net", None),
            ("example.net..", None),
            ("ex ample.net", None),
            ("ex\0ample.net", None),
            ("ex\\.ample.net", None),
            ("bücher.example", None),
            ("example.net\n", None),
        ];
        for (text, expect) in table {
            let name = DomainName::parse(text);
            assert_eq!(name.as_ref().map(DomainName::as_str), expect, "{text:?}");
            if let Some(name) = name {
                assert_eq!(DomainName::parse(name.as_str()), Some(name), "canonical already: {text:?}");
            }
        }
    }

    #[test]
    fn assigned_addresses_are_read_leniently_and_kept_only_if_they_are_proxies() {
        const ID: &str = "2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10";
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
        let full =
            |domain: &str, ips: &str| format!(r#"{{"resource":"{ID}","domain":{domain},"proxy_ips":{ips}}}"#);
        let both = ["100.96.0.1", "100.127.255.255", "fd00:2021:1111:8000::", "fd00:2021:1111:8000::1"];
        /// What it is, its JSON, the name and addresses that are read.
        type Row = (&'static str, String, Option<(&'static str, Vec<IpAddr>)>);
        let table: Vec<Row> = vec![
            (
                "unsorted and doubled",
                full(
                    r#""x.net""#,
                    r#"["fd00:2021:1111:8000::1","100.127.255.255","100.96.0.1","100.96.0.1","fd00:2021:1111:8000::"]"#,
                ),
                Some(("x.net", ips(&both))),
            ),
            (
                "not proxies",
                full(
                    r#""x.net""#,
                    r#"["8.8.8.8","100.95.255.255","100.128.0.0","10.0.0.1","127.0.0.1","::1","fd00:2021:1111::1",
                        "::ffff:100.96.0.1","100.96.0.9"]"#,
                ),
                Some(("x.net", ips(&["100.96.0.9"]))),
            ),
            ("no proxy at all", full(r#""x.net""#, r#"["8.8.8.8"]"#), Some(("x.net", vec![]))),
            ("none", full(r#""x.net""#, "[]"), Some(("x.net", vec![]))),
            ("case and dot", full(r#""X.Net.""#, "[]"), Some(("X.Net", vec![]))),
            ("an escape", full(r#""\u0078.net""#, "[]"), Some(("x.net", vec![]))),
            (
                "another order, unknown members",
                format!(r#" {{"new":{{"a":[1,[]]}},"proxy_ips":[],"domain":"x","resource":"{ID}"}} "#),
                Some(("x", vec![])),
            ),
            ("empty", String::new(), None),
            ("no object", "[]".into(), None),
            ("cut", full(r#""x.net""#, "[]")[..60].into(), None),
            ("more behind it", full(r#""x.net""#, "[]") + "x", None),
            ("no resource", r#"{"domain":"x","proxy_ips":[]}"#.into(), None),
            ("no domain", format!(r#"{{"resource":"{ID}","proxy_ips":[]}}"#), None),
            ("no addresses", format!(r#"{{"resource":"{ID}","domain":"x"}}"#), None),
            ("not a UUID", full(r#""x""#, "[]").replace(ID, "git"), None),
            ("not a name", full(r#""a..b""#, "[]"), None),
            ("a control character", full(r#""a\u0000b""#, "[]"), None),
            ("a name of the wrong type", full("7", "[]"), None),
            ("an address of the wrong type", full(r#""x""#, "[7]"), None),
            ("not an address", full(r#""x""#, r#"["100.96.0.256"]"#), None),
            ("a network", full(r#""x""#, r#"["100.96.0.0/11"]"#), None),
            ("not ASCII", full("\"\u{e9}.net\"", "[]"), None),
            ("deeply nested", format!(r#"{{"a":{}"#, "[".repeat(1200)), None),
        ];
        for (name, json, expect) in table {
            let got = AssignedIps::parse(json.as_bytes());
            let brief = got.as_ref().map(|got| (&*got.said, got.proxies.clone()));
            assert_eq!(brief, expect, "{name}");
            if let Some(got) = got {
                assert_eq!(got.resource.to_string(), ID, "{name}");
                assert_eq!(Some(got.domain), DomainName::parse(&got.said), "{name}");
            }
        }
        assert_eq!(AssignedIps::parse(b"{\"domain\":\"\xff\"}"), None);
    }
}

//! What the machine says about names: `/etc/resolv.conf` and `/etc/hosts`, looked at again and again: DHCP and VPN clients
//! rewrite them, mostly by renaming another file to them, which no watch on the file itself would see.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use gateway_proto::names::DomainName;
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

/// Where nameservers listen.
const PORT: u16 = 53;
/// The most of `ndots`, in dots, and of `timeout`, in seconds (resolv.conf(5)).
const MAX_NDOTS: usize = 15;
const MAX_TIMEOUT: u64 = 30;
/// The most of `attempts` (resolv.conf(5)).
const MAX_ATTEMPTS: usize = 5;

/// A file, and how it was when it was last read.
#[derive(Debug)]
pub struct Watched {
    path: PathBuf,
    /// `None` is "there is none", the outer one "not looked yet".
    seen: Option<Option<Stamp>>,
}

/// Device, inode, size in bytes, modification time in seconds and nanoseconds.
type Stamp = (u64, u64, u64, i64, i64);

impl Watched {
    /// Nothing is read yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), seen: None }
    }

    /// What is in it, if it is not the file of the last call; `Ok(None)` if it is.
    ///
    /// # Errors
    /// It cannot be read; the next call tells again only after a change.
    pub fn look(&mut self) -> io::Result<Option<String>> {
        let metadata = std::fs::metadata(&self.path);
        let stamp = metadata.as_ref().ok().map(|m| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()));
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        self.seen = Some(stamp);
        metadata?;
        // Bytes: an ISO 8859-1 letter in a comment is no reason to have no nameserver.
        let bytes = std::fs::read(&self.path)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// What `/etc/resolv.conf` says (resolv.conf(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvConf {
    /// All of them, in their order, each once.
    pub nameservers: Vec<SocketAddr>,
    /// Of the last `search` or `domain` line; without any, what follows the first dot of the host's name.
    pub search: Vec<DomainName>,
    /// A name with this many dots is first looked up as it is.
    pub ndots: usize,
    /// For one try.
    pub timeout: Duration,
    /// Tries.
    pub attempts: usize,
    /// Whether to say that long answers are welcome (RFC 6891).
    pub edns0: bool,
}

impl ResolvConf {
    /// Reads the file's text. What cannot be read is left out with a word, or without where it is no fault.
    pub fn parse(text: &str) -> Self {
        let own = rustix::system::uname();
        Self::parse_at(text, &own.nodename().to_string_lossy(), index_of)
    }

    fn parse_at(text: &str, hostname: &str, index_of: impl Fn(&str) -> Option<u32>) -> Self {
        let own_domain = hostname.split_once('.').and_then(|(_, domain)| DomainName::parse(domain));
        let mut conf = Self {
            nameservers: Vec::new(),
            search: own_domain.into_iter().collect(),
            ndots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            edns0: false,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let word = words.next().unwrap_or_default();
                    match address(word, &index_of) {
                        Some(server) if conf.nameservers.contains(&server) => {}
                        Some(server) => conf.nameservers.push(server),
                        None => tracing::info!(
                            "/etc/resolv.conf: {word:?} is no nameserver's address; leaving it out"
                        ),
                    }
                }
                // One of them replaces the other.
                Some("search") => conf.search = words.filter_map(DomainName::parse).collect(),
                Some("domain") => conf.search = words.take(1).filter_map(DomainName::parse).collect(),
                Some("options") => words.for_each(|word| conf.set(word)),
                _ => {}
            }
        }
        conf
    }

    /// Whom to ask: without any nameserver the one on this machine, as the C library has it (resolv.conf(5)).
    pub fn servers(&self) -> &[SocketAddr] {
        const LOCAL: &[SocketAddr] = &[SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT)];
        if self.nameservers.is_empty() { LOCAL } else { &self.nameservers }
    }

    fn set(&mut self, option: &str) {
        match option.split_once(':') {
            Some(("ndots", n)) => self.ndots = n.parse().map_or(self.ndots, |n: usize| n.min(MAX_NDOTS)),
            Some(("timeout", seconds)) => {
                let known = seconds.parse().ok().filter(|seconds| *seconds > 0);
                self.timeout =
                    known.map_or(self.timeout, |seconds: u64| Duration::from_secs(seconds.min(MAX_TIMEOUT)));
            }
            Some(("attempts", n)) => {
                let known = n.parse().ok().filter(|n| *n > 0);
                self.attempts = known.map_or(self.attempts, |n: usize| n.min(MAX_ATTEMPTS));
            }
            None if option == "edns0" => self.edns0 = true,
            _ => {}
        }
    }
}

/// `192.0.2.1`, `2001:db8::1`, `fe80::1%eth0` or `fe80::1%2`.
fn address(word: &str, index_of: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let (ip, scope) = match word.split_once('%') {
        Some((ip, scope)) => (ip, scope.parse().ok().or_else(|| index_of(scope)).map(Some)?),
        None => (word, None),
    };
    match (ip.parse().ok()?, scope) {
        (IpAddr::V6(ip), scope) => Some(SocketAddrV6::new(ip, PORT, 0, scope.unwrap_or(0)).into()),
        (IpAddr::V4(ip), None) => Some((ip, PORT).into()),
        (IpAddr::V4(_), Some(_)) => None,
    }
}

fn index_of(interface: &str) -> Option<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    name_to_index(any, interface).ok()
}

/// What `/etc/hosts` says: all addresses of a name, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hosts(HashMap<Box<str>, (Vec<Ipv4Addr>, Vec<Ipv6Addr>)>);

impl Hosts {
    /// Reads the file's text. An address with a scope, as macOS has it for `localhost`, is nothing one could send to.
    pub fn parse(text: &str) -> Self {
        let mut hosts = Self::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(ip) = words.next().and_then(|word| word.parse().ok()) else { continue };
            for name in words {
                let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
                let (v4, v6) = hosts.0.entry(name.into()).or_default();
                match ip {
                    IpAddr::V4(ip) => v4.push(ip),
                    IpAddr::V6(ip) => v6.push(ip),
                }
            }
        }
        hosts
    }

    /// The addresses of a name in canonical form; none of a family that the file has none of.
    pub fn get(&self, name: &str) -> (&[Ipv4Addr], &[Ipv6Addr]) {
        self.0.get(name).map_or((&[], &[]), |(v4, v6)| (v4, v6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_and_nothing_else_count() {
        let eth0 = |name: &str| (name == "eth0").then_some(7);
        let local: &[&str] = &["127.0.0.1:53"];
        let table: &[(&str, &str, &[&str])] = &[
            ("nothing", "", local),
            ("comments", "# nameserver 192.0.2.1\n;nameserver 192.0.2.1\n#nameserver 192.0.2.1\n", local),
            (
                "four, one twice",
                "search a.test\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # one\r\nnameserver 192.0.2.1\n\
                 nameserver 192.0.2.3\noptions edns0\nnameserver 192.0.2.4",
                &["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53", "192.0.2.4:53"],
            ),
            (
                "scopes",
                "nameserver fe80::1%eth0\nnameserver fe80::1%3\nnameserver fe80::1%gone\nnameserver 192.0.2.1%eth0",
                &["[fe80::1%7]:53", "[fe80::1%3]:53"],
            ),
            (
                "nonsense",
                "nameserver\nnameserver x\nnameserver 192.0.2.1:53\nnameservers 192.0.2.1\nnameserver %\nnameserver 1.2.3",
                local,
            ),
        ];
        for (name, text, expect) in table {
            let conf = ResolvConf::parse_at(text, "", eth0);
            let servers: Vec<String> = conf.servers().iter().map(SocketAddr::to_string).collect();
            assert_eq!(servers, *expect, "{name}");
        }
    }

    #[test]
    fn the_last_search_list_counts_and_options_add_up() {
        // Host name, text; search list, ndots, timeout in seconds, attempts, edns0.
        type Expect = (&'static [&'static str], usize, u64, usize, bool);
        let table: &[(&str, &str, Expect)] = &[
            ("gw", "", (&[], 1, 5, 2, false)),
            ("gw.Corp.example", "", (&["corp.example"], 1, 5, 2, false)),
            ("gw.corp.example", "search a.test B.test.\n", (&["a.test", "b.test"], 1, 5, 2, false)),
            ("gw", "domain a.test b.test\n", (&["a.test"], 1, 5, 2, false)),
            ("gw", "domain a.test\nsearch b.test c.test\n", (&["b.test", "c.test"], 1, 5, 2, false)),
            ("gw", "search b.test c.test\ndomain a.test\n", (&["a.test"], 1, 5, 2, false)),
            ("gw.corp.example", "search .\n", (&[], 1, 5, 2, false)),
            ("gw..x", "search -- a..b lan\n", (&["--", "lan"], 1, 5, 2, false)),
            (
                "gw",
                "options ndots:3 timeout:1 rotate\noptions attempts:4 edns0 trust-ad\n",
                (&[], 3, 1, 4, true),
            ),
            ("gw", "options ndots:99 timeout:99 attempts:99\n", (&[], 15, 30, 5, false)),
            (
                "gw",
                "options ndots: timeout:x attempts:-1 timeout:0 attempts:0 edns0:1 ndots\n",
                (&[], 1, 5, 2, false),
            ),
            ("gw", "options ndots:0\n", (&[], 0, 5, 2, false)),
        ];
        for (hostname, text, expect) in table {
            let conf = ResolvConf::parse_at(text, hostname, |_| None);
            let search: Vec<&str> = conf.search.iter().map(DomainName::as_str).collect();
            let got = (&search[..], conf.ndots, conf.timeout.as_secs(), conf.attempts, conf.edns0);
            assert_eq!(got, *expect, "{hostname}: {text}");
        }
    }

    #[test]
    fn hosts_have_addresses_by_family() {
        let hosts = Hosts::parse(
            "127.0.0.1 localhost\n::1\tlocalhost ip6-localhost # loopback\n# 192.0.2.9 no.test\n\
             192.0.2.1 Git.Test. git\r\n192.0.2.2 git.test#more\nfe80::1%lo0 localhost\nnonsense git.test\n\
             192.0.2.3\n2001:db8::6 six.test",
        );
        let table: [(&str, &[&str]); 7] = [
            ("localhost", &["127.0.0.1", "::1"]),
            ("ip6-localhost", &["::1"]),
            ("git.test", &["192.0.2.1", "192.0.2.2"]),
            ("git", &["192.0.2.1"]),
            ("six.test", &["2001:db8::6"]),
            ("no.test", &[]),
            ("", &[]),
        ];
        for (name, expect) in table {
            let (v4, v6) = hosts.get(name);
            let got: Vec<String> =
                v4.iter().map(Ipv4Addr::to_string).chain(v6.iter().map(Ipv6Addr::to_string)).collect();
            assert_eq!(got, expect, "{name}");
        }
    }

    #[test]
    fn a_file_is_read_again_when_it_changed_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut file = Watched::new(&path);
        assert!(file.look().is_err(), "there is none");
        assert_eq!(file.look().unwrap(), None, "and that was said");
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(file.look().unwrap().as_deref(), Some("nameserver 192.0.2.1\n"));
        assert_eq!(file.look().unwrap(), None);
        // As DHCP clients do it: same length, another inode.
        std::fs::write(folder.path().join("new"), "nameserver 192.0.2.2\n").unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(file.look().unwrap().as_deref(), Some("nameserver 192.0.2.2\n"));
        // And it needs not be UTF-8.
        std::fs::write(&path, b"# \xe9\n").unwrap();
        assert_eq!(file.look().unwrap().as_deref(), Some("# \u{fffd}\n"));
        std::fs::remove_file(&path).unwrap();
        assert!(file.look().is_err());
        assert_eq!(file.look().unwrap(), None);
    }
}

//! The nameservers of `/etc/resolv.conf`, and what is known of them.
//!
//! The file is looked at every few seconds: DHCP and VPN clients rewrite it, mostly by renaming another file to it,
//! which no watch on the file itself would see.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use super::rtt::Table;

/// How often the file is looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Where nameservers listen.
const PORT: u16 = 53;

/// Nameservers and their numbers. A query keeps the set that it started with.
#[derive(Debug)]
pub struct Set {
    /// In configured order.
    pub servers: Vec<SocketAddr>,
    /// By index into `servers`.
    pub table: RefCell<Table>,
}

impl Set {
    /// Nothing is known of `servers` yet.
    pub fn new(servers: Vec<SocketAddr>) -> Rc<Self> {
        let table = RefCell::new(Table::new(servers.len(), Instant::now()));
        Rc::new(Self { servers, table })
    }
}

/// The file, and how it was when it was last read.
#[derive(Debug)]
pub struct ResolvConf {
    path: PathBuf,
    /// `None` is "there is none", the outer one "not looked yet".
    seen: Option<Option<Stamp>>,
}

/// Device, inode, size in bytes, modification time in seconds and nanoseconds.
type Stamp = (u64, u64, u64, i64, i64);

impl ResolvConf {
    /// Nothing is read yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), seen: None }
    }

    /// The nameservers, if the file is not the one of the last call; `Ok(None)` if it is.
    ///
    /// # Errors
    /// It cannot be read; the next call tells again only after a change.
    pub fn look(&mut self) -> io::Result<Option<Vec<SocketAddr>>> {
        let metadata = std::fs::metadata(&self.path);
        let stamp = metadata.as_ref().ok().map(|m| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()));
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        self.seen = Some(stamp);
        metadata?;
        // Bytes: an ISO 8859-1 letter in a comment is no reason to have no nameserver.
        let text = std::fs::read(&self.path)?;
        Ok(Some(parse(&String::from_utf8_lossy(&text), index_of)))
    }
}

/// All `nameserver` lines, in their order, each once (resolv.conf(5)); what is no address is left out with a word.
fn parse(text: &str, index_of: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let word = words.next().unwrap_or_default();
        match address(word, &index_of) {
            Some(server) if servers.contains(&server) => {}
            Some(server) => servers.push(server),
            None => tracing::info!("/etc/resolv.conf: {word:?} is no nameserver's address; leaving it out"),
        }
    }
    servers
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_and_nothing_else_count() {
        let eth0 = |name: &str| (name == "eth0").then_some(7);
        let table: &[(&str, &str, &[&str])] = &[
            ("nothing", "", &[]),
            ("comments", "# nameserver 192.0.2.1\n;nameserver 192.0.2.1\n#nameserver 192.0.2.1\n", &[]),
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
                &[],
            ),
        ];
        for (name, text, expect) in table {
            let servers = parse(text, eth0);
            let servers: Vec<String> = servers.iter().map(SocketAddr::to_string).collect();
            assert_eq!(servers, *expect, "{name}");
        }
    }

    #[test]
    fn a_file_is_read_again_when_it_changed_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut file = ResolvConf::new(&path);
        assert!(file.look().is_err(), "there is none");
        assert_eq!(file.look().unwrap(), None, "and that was said");
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(file.look().unwrap(), Some(vec!["192.0.2.1:53".parse().unwrap()]));
        assert_eq!(file.look().unwrap(), None);
        // As DHCP clients do it: same length, another inode.
        std::fs::write(folder.path().join("new"), "nameserver 192.0.2.2\n").unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(file.look().unwrap(), Some(vec!["192.0.2.2:53".parse().unwrap()]));
        std::fs::remove_file(&path).unwrap();
        assert!(file.look().is_err());
        assert_eq!(file.look().unwrap(), None);
    }
}

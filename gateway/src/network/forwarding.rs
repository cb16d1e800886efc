//! The kernel's settings that make it a router (cli-and-service.md section 16.6), as differences that can be undone.
//!
//! Each family is turned on only where it is off. What was changed is put back at the end, unless it has been changed by
//! somebody else since. Turning IPv6 forwarding on makes the kernel deaf to router advertisements, from which a machine may
//! have its default route: interfaces of such routes are told to go on listening (`accept_ra` 2), before.

use std::{fmt, fs, io, path::Path};

/// Where the kernel shows its settings.
pub const SETTINGS: &str = "/proc/sys";
/// Where it shows its IPv6 routes.
pub const ROUTES: &str = "/proc/net/ipv6_route";

const FORWARD_V4: &str = "net/ipv4/ip_forward";
const FORWARD_V6: &str = "net/ipv6/conf/all/forwarding";

/// A setting that was one value and has been made another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its file below [`SETTINGS`].
    pub key: String,
    /// The value before.
    pub was: u8,
    /// The value that was written.
    pub is: u8,
}

impl Change {
    fn new(key: impl Into<String>, was: u8, is: u8) -> Self {
        Self { key: key.into(), was, is }
    }

    /// What does not work without it.
    pub fn loss(&self) -> &'static str {
        match &*self.key {
            FORWARD_V4 => "IPv4 packets of clients are not forwarded",
            FORWARD_V6 => "IPv6 packets of clients are not forwarded",
            _ => "this machine may lose its IPv6 default route",
        }
    }

    /// As `sysctl` names it; interfaces may have dots in their names, which it writes as slashes.
    pub fn name(&self) -> String {
        if self.key.contains('.') { self.key.clone() } else { self.key.replace('/', ".") }
    }
}

/// What [`Change::parse`] reads.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {}, is {}", self.key, self.was, self.is)
    }
}

impl Change {
    /// Reads what [`Display`](fmt::Display) writes; `None` for anything else, and for settings that are none of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let (key, values) = text.split_once(" was ")?;
        let (was, is) = values.split_once(", is ")?;
        let change = Self::new(key, was.parse().ok()?, is.parse().ok()?);
        let interface = key.strip_prefix("net/ipv6/conf/").and_then(|rest| rest.strip_suffix("/accept_ra"));
        let ours = [FORWARD_V4, FORWARD_V6].contains(&key)
            || interface.is_some_and(|name| !name.contains('/') && ![".", "..", ""].contains(&name));
        ours.then_some(change)
    }
}

/// What has to be changed, in this order, and what an earlier life changed that still stands.
///
/// `settings` is [`SETTINGS`], `routes` the text of [`ROUTES`], `remembered` what the earlier life left.
pub fn plan(settings: &Path, routes: &str, remembered: &[Change]) -> Plan {
    let stands = |change: &Change| read(settings, &change.key) == Some(change.is);
    let kept: Vec<Change> = remembered.iter().filter(|change| stands(change)).cloned().collect();
    let mut to_make = Vec::new();
    if read(settings, FORWARD_V6) == Some(0) {
        for interface in learned_defaults(routes) {
            let key = format!("net/ipv6/conf/{interface}/accept_ra");
            if read(settings, &key) == Some(1) && !to_make.iter().any(|change: &Change| change.key == key) {
                to_make.push(Change::new(key, 1, 2));
            }
        }
        to_make.push(Change::new(FORWARD_V6, 0, 1));
    }
    if read(settings, FORWARD_V4) == Some(0) {
        to_make.push(Change::new(FORWARD_V4, 0, 1));
    }
    Plan { kept, to_make }
}

/// See [`plan`].
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Made by an earlier life, and still so.
    pub kept: Vec<Change>,
    /// To be made now.
    pub to_make: Vec<Change>,
}

/// Writes the new value.
///
/// # Errors
/// With what the kernel says.
pub fn make(settings: &Path, change: &Change) -> io::Result<()> {
    fs::write(settings.join(&change.key), change.is.to_string())
}

/// Puts the old value back; whether there was anything to put back.
///
/// # Errors
/// With what the kernel says.
pub fn undo(settings: &Path, change: &Change) -> io::Result<bool> {
    if read(settings, &change.key) != Some(change.is) {
        return Ok(false);
    }
    fs::write(settings.join(&change.key), change.was.to_string()).map(|()| true)
}

/// `None` if it does not exist (a kernel without IPv6, an interface that is gone).
fn read(settings: &Path, key: &str) -> Option<u8> {
    fs::read_to_string(settings.join(key)).ok()?.trim().parse().ok()
}

/// The interfaces of default routes that came by router advertisement.
fn learned_defaults(routes: &str) -> impl Iterator<Item = &str> {
    /// RTF_ADDRCONF, linux/ipv6_route.h.
    const LEARNED: u32 = 0x0004_0000;
    // destination, its prefix length, source, its prefix length, gateway, metric, references, uses, flags, interface
    routes.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, "00", _, _, _, _, _, _, flags, interface] = fields[..] else { return None };
        let learned = u32::from_str_radix(flags, 16).ok()? & LEARNED != 0;
        (learned && destination.bytes().all(|digit| digit == b'0')).then_some(interface)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER_SAID: &str = "\
20010db8000900000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00040001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000002 00000400 00000001 00000000 00450003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003   eth1.5
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    fn machine(values: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (key, value) in values {
            let file = root.path().join(key);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{value}\n")).unwrap();
        }
        root
    }

    fn change(text: &str) -> Change {
        Change::parse(text).unwrap()
    }

    #[test]
    fn only_what_is_off_is_turned_on() {
        let (v4, v6) = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding");
        let (ra, ra1) = ("net/ipv6/conf/eth0/accept_ra", "net/ipv6/conf/eth1.5/accept_ra");
        let listen = "net/ipv6/conf/eth0/accept_ra was 1, is 2";
        let (on4, on6) = ("net/ipv4/ip_forward was 0, is 1", "net/ipv6/conf/all/forwarding was 0, is 1");
        // settings; what an earlier life left; kept; to make
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str], &'a [&'a str], &'a [&'a str]);
        let table: &[Case<'_>] = &[
            (&[(v4, "0"), (v6, "0")], &[], &[], &[on6, on4]),
            (&[(v4, "1"), (v6, "1")], &[], &[], &[]),
            (&[(v4, "1"), (v6, "0")], &[], &[], &[on6]),
            // A kernel without IPv6.
            (&[(v4, "0")], &[], &[], &[on4]),
            (&[], &[], &[], &[]),
            // The one interface that has its default route from a router goes on listening, and hears of it first.
            (&[(v4, "1"), (v6, "0"), (ra, "1"), (ra1, "1")], &[], &[], &[listen, on6]),
            (&[(v4, "1"), (v6, "0"), (ra, "0")], &[], &[], &[on6]),
            (&[(v4, "1"), (v6, "0"), (ra, "2")], &[], &[], &[on6]),
            (&[(v4, "1"), (v6, "1"), (ra, "1")], &[], &[], &[]),
            // An earlier life was killed.
            (&[(v4, "1"), (v6, "1"), (ra, "2")], &[listen, on6, on4], &[listen, on6, on4], &[]),
            // Somebody has turned one off since.
            (&[(v4, "0"), (v6, "1")], &[on6, on4], &[on6], &[on4]),
        ];
        for (settings, remembered, kept, to_make) in table {
            let root = machine(settings);
            let remembered: Vec<_> = remembered.iter().map(|text| change(text)).collect();
            let plan = plan(root.path(), ROUTER_SAID, &remembered);
            let texts = |changes: &[Change]| changes.iter().map(ToString::to_string).collect::<Vec<_>>();
            assert_eq!(texts(&plan.kept), *kept, "{settings:?} {remembered:?}");
            assert_eq!(texts(&plan.to_make), *to_make, "{settings:?} {remembered:?}");
        }
    }

    #[test]
    fn what_nobody_else_changed_is_put_back() {
        let key = "net/ipv4/ip_forward";
        let on = change("net/ipv4/ip_forward was 0, is 1");
        let root = machine(&[(key, "0")]);
        make(root.path(), &on).unwrap();
        assert_eq!(read(root.path(), key), Some(1));
        assert!(undo(root.path(), &on).unwrap());
        assert_eq!(read(root.path(), key), Some(0));
        assert!(!undo(root.path(), &on).unwrap(), "it is off already");
        fs::write(root.path().join(key), "2").unwrap();
        assert!(!undo(root.path(), &on).unwrap(), "somebody else's value");
        assert_eq!(read(root.path(), key), Some(2));
        assert!(!undo(root.path(), &change("net/ipv6/conf/gone/accept_ra was 1, is 2")).unwrap());
    }

    #[test]
    fn only_our_settings_are_read_back() {
        for text in [
            "net/ipv4/ip_forward was 0, is 1",
            "net/ipv6/conf/all/forwarding was 0, is 1",
            "net/ipv6/conf/eth0.5/accept_ra was 1, is 2",
        ] {
            assert_eq!(change(text).to_string(), text);
        }
        for text in [
            "",
            "net/ipv4/ip_forward",
            "net/ipv4/ip_forward was 0, is",
            "net/ipv4/ip_forward was 0, is 1000",
            "kernel/panic was 0, is 1",
            "../../etc/x was 0, is 1",
            "net/ipv6/conf/../accept_ra was 1, is 2",
            "net/ipv6/conf/../../accept_ra was 1, is 2",
            "net/ipv6/conf//accept_ra was 1, is 2",
        ] {
            assert_eq!(Change::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn settings_are_named_as_sysctl_does() {
        assert_eq!(change("net/ipv4/ip_forward was 0, is 1").name(), "net.ipv4.ip_forward");
        assert_eq!(
            change("net/ipv6/conf/eth0.5/accept_ra was 1, is 2").name(),
            "net/ipv6/conf/eth0.5/accept_ra"
        );
    }
}

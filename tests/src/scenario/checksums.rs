//! What the kernels of all hosts say about checksums: a packet that was rewritten wrongly is refused where it arrives, in
//! silence, and sent again. Only these counters tell.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::net::{netns, topology::Topology};

/// What `/proc/net/snmp` and `/proc/net/snmp6` call it.
const SUFFIX: &str = "InCsumErrors";

/// The hosts of a topology, by name and file.
pub struct Checksums(Vec<(String, PathBuf)>);

impl Checksums {
    /// All namespaces of `topology`.
    pub fn of(topology: &Topology) -> Self {
        Self(topology.namespaces().iter().map(|host| (host.name().to_owned(), host.path())).collect())
    }

    /// No host has refused a packet for its checksum since its namespace was made.
    ///
    /// # Errors
    /// With the hosts and counters of those that have.
    pub fn check(&self) -> Result<()> {
        let mut bad = Vec::new();
        for (host, path) in &self.0 {
            let said = std::thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    netns::enter(path)?;
                    // Of the thread's namespace; /proc/net is that of the process.
                    ["snmp", "snmp6"]
                        .iter()
                        .map(|name| {
                            let file = format!("/proc/thread-self/net/{name}");
                            std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))
                        })
                        .collect::<Result<Vec<String>>>()
                });
                reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
            let wrong = wrong(&said[0], &said[1])?;
            if !wrong.is_empty() {
                bad.push(format!("{host}: {}", wrong.join(", ")));
            }
        }
        ensure!(bad.is_empty(), "packets with wrong checksums arrived: {}", bad.join("; "));
        Ok(())
    }
}

/// The counters that are not 0, of the table of IPv4 (a line of names, a line of values) and of that of IPv6 (a name and a
/// value a line).
fn wrong(v4: &str, v6: &str) -> Result<Vec<String>> {
    let (mut seen, mut wrong) = (0, Vec::new());
    let mut look = |protocol: &str, name: &str, value: &str| {
        if name.ends_with(SUFFIX) {
            seen += 1;
            if value != "0" {
                wrong.push(format!("{protocol}{name} {value}"));
            }
        }
    };
    let lines: Vec<&str> = v4.lines().collect();
    for pair in lines.chunks_exact(2) {
        let (mut names, values) = (pair[0].split_whitespace(), pair[1].split_whitespace().skip(1));
        let protocol = names.next().unwrap_or_default();
        names.zip(values).for_each(|(name, value)| look(protocol, name, value));
    }
    for line in v6.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(value)) = (words.next(), words.next()) {
            look("", name, value);
        }
    }
    // Icmp, Tcp, Udp, UdpLite; Icmp6, Udp6, UdpLite6.
    ensure!(seen >= 5, "only {seen} counters of checksums in {v4}{v6}");
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "Ip: Forwarding InReceives\nIp: 1 7\nIcmp: InMsgs InErrors InCsumErrors\nIcmp: 3 0 0\n\
                      Tcp: InSegs InErrs InCsumErrors\nTcp: 9 1 1\nUdp: InDatagrams InCsumErrors MemErrors\n\
                      Udp: 5 0 2\n";
    const V6: &str = "Ip6InReceives 4\nIcmp6InCsumErrors 12\nUdp6InCsumErrors 0\n";

    #[test]
    fn counters_that_are_not_0_are_named() {
        assert_eq!(wrong(V4, V6).unwrap(), ["Tcp:InCsumErrors 1", "Icmp6InCsumErrors 12"]);
    }

    #[test]
    fn a_kernel_without_these_counters_is_told() {
        assert!(wrong("Ip: Forwarding\nIp: 1\n", V6).is_err());
    }
}

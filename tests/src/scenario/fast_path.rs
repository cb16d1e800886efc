//! That a gateway which is told to take the fast path does: the kernel says so, not the gateway.
//!
//! ```text
//!   eth0 of the gateway -> its XDP program -> that program's maps -> VERDICTS -> frames that were redirected
//! ```
//!
//! Maps are found by the program, so nothing has to be pinned.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use gateway_common::{
    DropReason,
    maps::{self, MapSpec, Outcome},
};
use serde_json::Value;

use super::Context as Scenario;
use crate::net::{
    netns,
    process::run,
    topology::{Nat, Topology},
};

/// The gateway's uplink.
const UPLINK: &str = "eth0";
/// What a device with an XDP program does without: super-packets would have to be cut or put together elsewhere.
const OFFLOADS: [&str; 6] =
    ["gro", "gso", "tso", "tx-udp-segmentation", "rx-gro-list", "rx-udp-gro-forwarding"];

/// Makes the uplink like a NIC's: one packet a frame. A veth pair has no wire between its ends, and what one end does not
/// cut, the other does not either.
///
/// # Errors
/// With what `ethtool` said.
pub fn prepare(topology: &Topology) -> Result<()> {
    let mut ends = vec![(&topology.gateway.namespace, UPLINK)];
    if topology.plan.gateway_nat == Nat::None {
        ends.push((&topology.router, "gw"));
    }
    for (namespace, device) in ends {
        let mut command = vec!["ethtool", "-K", device];
        OFFLOADS.iter().for_each(|offload| command.extend([offload, "off"]));
        run(namespace, Duration::from_secs(5), &command)?.success()?;
    }
    Ok(())
}

/// Every gateway of this scenario takes the fast path natively and without a word of FIREZONE_DISABLE, whatever the list
/// runs in.
///
/// # Errors
/// As for [`prepare`].
pub(super) fn native(cx: &mut Scenario) -> Result<()> {
    "native".clone_into(&mut cx.variation.fast_path);
    cx.variation.disable.clear();
    prepare(&cx.topology)
}

/// Where to ask.
pub struct Proof(PathBuf);

impl Proof {
    /// Asks the gateway of `topology`.
    pub fn of(topology: &Topology) -> Self {
        Self(topology.gateway.namespace.path())
    }

    /// How many frames the gateway's program has redirected to AF_XDP sockets.
    ///
    /// # Errors
    /// If there is no such program, or `bpftool` does not say.
    pub fn redirected(&self) -> Result<u64> {
        const REDIRECTED: u64 = Outcome::Redirected as u64;
        packets(&self.dump(&maps::VERDICTS)?, REDIRECTED)
    }

    /// The kernel's number of the XDP program on the uplink; `None` if there is none.
    ///
    /// # Errors
    /// If `ip` does not say.
    pub fn program(&self) -> Result<Option<u64>> {
        let link = self.json(&["ip", "-j", "-d", "link", "show", "dev", UPLINK])?;
        Ok(link[0]["xdp"]["prog"]["id"].as_u64())
    }

    /// How many frames the gateway's program has dropped, by reason; reasons without any are left out.
    ///
    /// # Errors
    /// As for [`Proof::redirected`].
    pub fn drops(&self) -> Result<BTreeMap<&'static str, u64>> {
        let dump = self.dump(&maps::DROPS)?;
        let reasons =
            DropReason::ALL.iter().map(|&reason| Ok((reason.label(), packets(&dump, reason as u64)?)));
        Ok(reasons.collect::<Result<Vec<_>>>()?.into_iter().filter(|(_, packets)| *packets > 0).collect())
    }

    /// The numbers of the channels that the gateway's program knows.
    ///
    /// # Errors
    /// As for [`Proof::redirected`].
    pub fn channels(&self) -> Result<Vec<u16>> {
        let dump = self.dump(&maps::CHANNELS)?;
        let numbers = dump.as_array().context("a dump is a list")?.iter();
        numbers
            .map(|entry| {
                let number = entry["formatted"]["key"]["number"].as_u64();
                Ok(u16::try_from(number.with_context(|| format!("an entry without number: {entry}"))?)?)
            })
            .collect()
    }

    /// What a map of the program holds.
    fn dump(&self, wanted: &MapSpec) -> Result<Value> {
        let program = self.program()?.with_context(|| format!("no XDP program is attached to {UPLINK}"))?;
        let program = self.json(&["bpftool", "-j", "prog", "show", "id", &program.to_string()])?;
        ensure!(program["name"] == "uplink", "another program is attached to {UPLINK}: {program}");
        for map in program["map_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64) {
            let map = map.to_string();
            if self.json(&["bpftool", "-j", "map", "show", "id", &map])?["name"] == wanted.name {
                return self.json(&["bpftool", "-j", "map", "dump", "id", &map]);
            }
        }
        anyhow::bail!("the program has no map {}: {program}", wanted.name)
    }

    /// The fast path has carried packets.
    ///
    /// # Errors
    /// If it has not.
    pub fn check(&self) -> Result<()> {
        let frames = self.redirected().context("the fast path cannot be proved")?;
        ensure!(frames > 0, "no frame took the fast path");
        Ok(())
    }

    fn json(&self, command: &[&str]) -> Result<Value> {
        let output = std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                netns::enter(&self.0)?;
                let output = std::process::Command::new(command[0]).args(&command[1..]).output();
                output.with_context(|| format!("cannot start {}", command[0]))
            });
            asker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        ensure!(
            output.status.success(),
            "`{}` failed: {}{}",
            command.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`{}` said no JSON", command.join(" ")))
    }
}

/// Of a dump of a map of counters: the packets of an entry, summed over the CPUs.
fn packets(dump: &Value, entry: u64) -> Result<u64> {
    let entries = dump.as_array().context("a dump is a list")?;
    let found = entries.iter().find(|found| found["formatted"]["key"] == entry);
    let values = found.and_then(|found| found["formatted"]["values"].as_array());
    let values = values.with_context(|| format!("the map has no entry {entry}: {dump}"))?;
    Ok(values.iter().filter_map(|cpu| cpu["value"]["packets"].as_u64()).sum())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn frames_are_summed_over_the_cpus() {
        let cpu = |cpu: u32, packets: u64| json!({"cpu": cpu, "value": {"packets": packets, "bytes": 9}});
        let entry = |key: u32, n: u64| json!({"key": ["0x00"], "formatted": {"key": key, "values": [cpu(0, n), cpu(1, n + 1)]}});
        let dump = json!([entry(0, 100), entry(2, 7), entry(3, 50)]);
        assert_eq!(packets(&dump, Outcome::Redirected as u64).unwrap(), 15);
        assert!(packets(&json!([entry(0, 100)]), 2).is_err());
        assert!(packets(&json!({}), 0).is_err());
    }
}

//! Watches what comes in by an interface, and sends packets out of it: `tap.py` in the interface's namespace.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::ChildStdin,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::packet::{Arrived, Flow, ICMPV6, arrived};
use crate::{
    net::{
        NetNs,
        process::{Logs, Process, Spawn, wait_for},
    },
    scenario::metrics::PYTHON,
};

/// A running watcher; it ends with this value.
pub struct Tap {
    _process: Process,
    orders: ChildStdin,
    seen: Arc<Mutex<Result<Vec<Arrived>>>>,
}

impl Tap {
    /// Watches `interface`. `chosen` says that identifications there are ours and are compared.
    ///
    /// # Errors
    /// If it does not come up within 5 s.
    pub fn start(namespace: &NetNs, logs: &Logs, interface: &str, chosen: bool) -> Result<Self> {
        let program = include_str!("tap.py");
        let command = [PYTHON, "-c", program, interface].map(str::to_owned).to_vec();
        let name = format!("tap-{interface}");
        let spawn = Spawn { name: &name, command, piped: true, ..Spawn::default() };
        let mut process = Process::spawn(namespace, logs, &spawn)?;
        let (orders, packets) = process.pipes().context("pipes")?;
        let seen = Arc::new(Mutex::new(Ok(Vec::new())));
        let (ready, is_ready) = mpsc::channel();
        let all = Arc::clone(&seen);
        std::thread::Builder::new().name(name).spawn(move || {
            for line in BufReader::new(packets).lines().map_while(Result::ok) {
                if line == "ready" {
                    let _somebody_waits = ready.send(());
                    continue;
                }
                let packet = read(&line, chosen).with_context(|| line.clone());
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                match packet {
                    Ok(packets) => {
                        if let Ok(all) = &mut *all {
                            all.extend(packets.into_iter().filter(|packet| is_ours(&packet.flow)));
                        }
                    }
                    Err(error) => *all = Err(error),
                }
            }
        })?;
        is_ready
            .recv_timeout(Duration::from_secs(5))
            .with_context(|| format!("tap.py: {}", process.log()))?;
        Ok(Self { _process: process, orders, seen })
    }

    /// Sends a packet out of the interface.
    ///
    /// # Errors
    /// If the watcher has ended.
    pub fn send(&mut self, packet: &[u8]) -> Result<()> {
        writeln!(self.orders, "{}", hex::encode(packet)).context("tap.py has ended")
    }

    /// Waits until `packets` that `are_meant` have arrived, altogether.
    ///
    /// # Errors
    /// If fewer have within `limit`, or something that is no packet.
    pub fn wait(
        &self,
        what: &str,
        packets: usize,
        limit: Duration,
        are_meant: impl Fn(&Flow) -> bool,
    ) -> Result<()> {
        let mut seen = 0;
        wait_for(what, limit, || {
            let all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let all = all.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            seen = all.iter().filter(|packet| are_meant(&packet.flow)).count();
            Ok((seen >= packets).then_some(()))
        })
        .with_context(|| format!("{seen} of {packets} arrived"))
    }

    /// Everything that has arrived, in order.
    ///
    /// # Errors
    /// If something came that is no packet.
    pub fn all(&self) -> Result<Vec<Arrived>> {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *all, Ok(Vec::new()))
    }
}

fn read(line: &str, chosen: bool) -> Result<Vec<Arrived>> {
    let mut words = line.split(' ');
    let mut word = || words.next().context("three words");
    let (pieces, left, bytes) = (word()?.parse()?, word()? != "0", hex::decode(word()?)?);
    ensure!(words.next().is_none(), "three words");
    arrived(&bytes, pieces, left, chosen)
}

/// Neighbour discovery (RFC 4861) is the link's own.
fn is_ours(flow: &Flow) -> bool {
    let neighbours = flow.protocol == ICMPV6 && (130..=143).contains(&flow.about[0]);
    !neighbours && !flow.to.is_multicast()
}

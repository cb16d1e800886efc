//! Two namespaces and a veth, which a test makes and removes.
//!
//! ```text
//!   [ sender ] far0 10.99.7.2, fd99:7::2 --- veth --- up0 10.99.7.1, fd99:7::1 [ receiver ]
//! ```

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Two namespaces with a veth between them; removed when dropped.
pub struct Network {
    prefix: String,
}

impl Network {
    pub fn make() -> Result<Self> {
        let network = Self { prefix: format!("fz-bpf-{}", std::process::id()) };
        let (sender, receiver) = (network.namespace("sender"), network.namespace("receiver"));
        let sides = [(&receiver, "up0", 1, 2), (&sender, "far0", 2, 1)];
        ip(&format!("netns add {sender}"))?;
        ip(&format!("netns add {receiver}"))?;
        ip(&format!("-n {receiver} link add name up0 type veth peer name far0 netns {sender}"))?;
        for (namespace, name, own, _) in sides {
            ip(&format!("-n {namespace} link set {name} address 02:00:00:00:07:0{own} up"))?;
            ip(&format!("-n {namespace} address add 10.99.7.{own}/24 dev {name}"))?;
            ip(&format!("-n {namespace} address add fd99:7::{own}/64 dev {name} nodad"))?;
        }
        // Static neighbours: a queue in front of a neighbour look-up drops what a test sends in one go.
        for (namespace, name, _, other) in sides {
            for address in [format!("10.99.7.{other}"), format!("fd99:7::{other}")] {
                let hardware = format!("02:00:00:00:07:0{other}");
                ip(&format!("-n {namespace} neighbour replace {address} lladdr {hardware} dev {name}"))?;
            }
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while !std::str::from_utf8(&ip(&format!("-n {receiver} link show up0"))?)?.contains("state UP") {
            ensure!(Instant::now() < deadline, "the veth does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(network)
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// Runs `work` on a thread inside a namespace; only the network is another one.
    pub fn enter<T: Send>(&self, name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = std::fs::File::open(format!("/run/netns/{}", self.namespace(name)))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in ["sender", "receiver"] {
            // One that was never made cannot be removed.
            let _gone = ip(&format!("netns delete {}", self.namespace(name)));
        }
    }
}

pub fn ip(arguments: &str) -> Result<Vec<u8>> {
    run(&format!("ip {arguments}"))
}

/// Runs a command of words without spaces in the calling thread's network namespace.
pub fn run(command: &str) -> Result<Vec<u8>> {
    let mut words = command.split_whitespace();
    let program = words.next().context("an empty command")?;
    let output =
        Command::new(program).args(words).output().with_context(|| format!("cannot start {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{command}` failed: {error}");
    Ok(output.stdout)
}

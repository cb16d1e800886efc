//! `firezone-gateway cleanup`: removes what a daemon left that was killed, or what upstream's script left.

use anyhow::{Context as _, Result, ensure};

use super::upstream;
use crate::{
    data::{TUN_NAME, interface::Interface, lock::InstanceLock},
    identity,
};

/// Removes the table, the routing rules and the changed settings of a daemon that ended without order; with
/// `upstream_rules` the rules of upstream's `firezone-gateway-init` instead. Says on standard output what it did.
///
/// # Errors
/// If a daemon runs (whose things these are), a right is missing, or nftables or iptables does not work.
pub fn run(upstream_rules: bool) -> Result<()> {
    ensure!(
        identity::has_net_admin(),
        "cleaning up needs CAP_NET_ADMIN, and it is not in the effective set; run as root"
    );
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    if upstream_rules {
        let deleted = tokio.block_on(upstream::remove());
        return report(deleted.context("upstream's rules cannot be deleted")?);
    }
    let _lock = InstanceLock::acquire(TUN_NAME)?;
    tokio.block_on(async {
        let (mut done, removed) = super::remove(None).await;
        let interface = Interface::new(TUN_NAME)?;
        done.extend(
            interface.remove().await.iter().map(|family| format!("Removed the {family:?} routing rule")),
        );
        match removed {
            Ok(()) => report(done),
            // What was done is worth knowing all the same.
            Err(e) => {
                done.iter().for_each(|line| println!("{line}"));
                Err(e).context("the nftables table cannot be removed")
            }
        }
    })
}

fn report(done: Vec<String>) -> Result<()> {
    if done.is_empty() {
        println!("There was nothing to remove");
    }
    done.iter().for_each(|line| println!("{line}"));
    Ok(())
}

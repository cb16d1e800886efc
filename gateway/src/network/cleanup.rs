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
    let done = if upstream_rules {
        tokio.block_on(upstream_leftovers())?
    } else {
        let _lock = InstanceLock::acquire(TUN_NAME)?;
        tokio.block_on(our_leftovers())?
    };
    if done.is_empty() {
        println!("There was nothing to remove");
    }
    done.iter().for_each(|line| println!("{line}"));
    Ok(())
}

async fn our_leftovers() -> Result<Vec<String>> {
    let mut done = super::remove(None).await.context("the table cannot be removed")?;
    let interface = Interface::new(TUN_NAME)?;
    for family in interface.remove().await {
        done.push(format!("Removed the {family:?} routing rule of {TUN_NAME}"));
    }
    Ok(done)
}

async fn upstream_leftovers() -> Result<Vec<String>> {
    let deleted = upstream::remove().await.context("upstream's rules cannot be removed")?;
    Ok(deleted.into_iter().map(|rule| format!("Deleted what was added by: {rule}")).collect())
}

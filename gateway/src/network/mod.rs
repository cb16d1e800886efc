//! The daemon makes the machine a router for its clients: forwarding on, tunnel ranges masqueraded, all in a table of its own
//! ([`table`]) and in settings that are put back ([`forwarding`]). Rules of others are read ([`foreign`]) and never edited.
//!
//! What does not succeed costs one WARN sentence with the cure, and the daemon goes on: an operator may have done it all
//! already. A table that somebody flushes away (`systemctl restart nftables` does) is made again ([`watch`]).
//! This folder knows nothing of clients and packets.

mod advice;
pub mod cleanup;
mod foreign;
mod forwarding;
mod legacy;
mod nft;
mod table;
mod upstream;
mod watch;

use std::{fs, io, path::Path, time::Duration};

use forwarding::{Change, ROUTES, SETTINGS};
use tokio::task::JoinHandle;

/// How long the removal may take at the end of the daemon; a supervisor waits 15 s for all of it.
const REMOVAL_LIMIT: Duration = Duration::from_secs(5);

/// What has been set up, until [`Network::tear_down`].
pub struct Network {
    changes: Vec<Change>,
    /// There is a table of ours.
    installed: bool,
    watch: JoinHandle<()>,
}

impl Network {
    /// Turns forwarding on where it is off and puts our table in place, for packets from and to the device `tun`.
    ///
    /// What cannot be done is said at WARN.
    pub async fn set_up(tun: &'static str) -> Self {
        let left = nft::list(Some(table::TABLE)).await.unwrap_or_default();
        let routes = fs::read_to_string(ROUTES).unwrap_or_default();
        let plan = forwarding::plan(Path::new(SETTINGS), &routes, &table::remembered(&left));
        let mut changes = plan.kept;
        changes.extend(plan.to_make.iter().cloned());
        // Before anything is changed, so that nothing is missed.
        let notices = watch::Notices::listen();
        // The table first: it remembers what is changed next.
        let installed = nft::apply(&table::install(tun, &changes)).await;
        match &installed {
            Ok(()) => tracing::info!(
                "What clients send to resources is masqueraded by the nftables table {}",
                table::TABLE
            ),
            Err(e) => tracing::warn!("{}", no_table(e)),
        }
        for change in plan.to_make {
            match forwarding::make(Path::new(SETTINGS), &change) {
                Ok(()) => tracing::info!("{} is {} now, was {}", change.name(), change.is, change.was),
                Err(e) => {
                    tracing::warn!("{}", no_setting(&change, &e));
                    changes.retain(|other| *other != change);
                }
            }
        }
        let installed = installed.is_ok();
        let watch = tokio::spawn(watch::run(notices, tun, changes.clone(), installed));
        Self { changes, installed, watch }
    }

    /// Removes the table and puts back what was changed.
    pub async fn tear_down(self) {
        self.watch.abort();
        // It may be making the table again at this moment.
        let _cancelled = self.watch.await;
        let Ok((done, removed)) = tokio::time::timeout(REMOVAL_LIMIT, remove(Some(self.changes))).await
        else {
            return tracing::warn!(
                "Removing the network set-up takes longer than {REMOVAL_LIMIT:?}; `firezone-gateway cleanup` finishes it"
            );
        };
        done.iter().for_each(|sentence| tracing::info!("{sentence}"));
        match removed {
            Ok(()) => {}
            Err(e) if self.installed => tracing::warn!(
                "The nftables table {} stays, because {e}; the next start or `firezone-gateway cleanup` removes it",
                table::TABLE
            ),
            // What kept it from being made has been said.
            Err(e) => tracing::debug!("No nftables table is removed, because {e}"),
        }
    }
}

/// Removes our table, and puts back `changes`, or what the table remembers. Returns what was done, in sentences, and an error if
/// there may be a table that cannot be removed; the settings are put back all the same.
async fn remove(changes: Option<Vec<Change>>) -> (Vec<String>, Result<(), nft::Error>) {
    let mut done = Vec::new();
    let listed = nft::list(Some(table::TABLE)).await;
    let changes = changes.unwrap_or_else(|| table::remembered(listed.as_deref().unwrap_or_default()));
    let removed = match listed {
        Err(e) if e.is_absence() => Ok(false),
        // Where there is no program there never was a table of ours.
        Err(nft::Error::Missing(_)) => Ok(false),
        // It may still be removed if it cannot be read: not every nft speaks JSON.
        _ => match nft::apply(&table::remove()).await {
            Ok(()) => Ok(true),
            Err(e) if e.is_absence() => Ok(false),
            Err(e) => Err(e),
        },
    };
    if matches!(removed, Ok(true)) {
        done.push(format!("Removed the nftables table {}", table::TABLE));
    }
    if !changes.is_empty() {
        match foreign::who_translates(&nft::list(None).await.unwrap_or_default()) {
            Some(other) => done.push(format!(
                "Left forwarding on: the nftables table {other} translates addresses, so somebody else may need it"
            )),
            None => done.extend(changes.iter().rev().filter_map(put_back)),
        }
    }
    (done, removed.map(drop))
}

fn put_back(change: &Change) -> Option<String> {
    let name = change.name();
    match forwarding::undo(Path::new(SETTINGS), change) {
        Ok(true) => Some(format!("{name} is {} again", change.was)),
        Ok(false) => None,
        Err(e) => Some(format!("{name} stays {}: {e}", change.is)),
    }
}

/// Why nothing is masqueraded by us, and what to do.
fn no_table(error: &nft::Error) -> String {
    let cure = match error {
        nft::Error::Missing(_) => "install the package nftables",
        _ => "mend that",
    };
    format!(
        "Resources cannot answer clients, because the gateway cannot have their packets masqueraded: {error}; {cure}, or \
         prepare the machine by README.md and start with --no-network-setup"
    )
}

/// Why a setting is as it was, and what to do.
fn no_setting(change: &Change, error: &io::Error) -> String {
    let (loss, name, is) = (change.loss(), change.name(), change.is);
    format!(
        "{loss}: {name} is {} and cannot be set ({error}); set it from outside, by `sysctl -w {name}={is}` or \
         `docker run --sysctl {name}={is}`",
        change.was
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_name_loss_reason_and_cure() {
        let missing = no_table(&nft::Error::Missing("nft".to_owned()));
        for part in
            ["cannot answer clients", "`nft` is not installed", "package nftables", "--no-network-setup"]
        {
            assert!(missing.contains(part), "{part}: {missing}");
        }
        let forbidden = no_table(&nft::Error::NotPermitted("nft".to_owned()));
        assert!(forbidden.contains("AmbientCapabilities="), "{forbidden}");
        let change = Change::parse("net/ipv6/conf/all/forwarding was 0, is 1").unwrap();
        let read_only = no_setting(&change, &io::Error::from_raw_os_error(libc::EROFS));
        for part in ["IPv6 packets", "Read-only file system", "sysctl -w net.ipv6.conf.all.forwarding=1"] {
            assert!(read_only.contains(part), "{part}: {read_only}");
        }
    }
}

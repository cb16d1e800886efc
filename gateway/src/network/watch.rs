//! Looks after the table while the daemon runs: when the firewall of the machine has changed (the kernel tells), the table is
//! made again if it is gone, and whether somebody else drops clients' packets is looked at again.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
    netlink::{self, SocketAddrNetlink},
    recv, socket_with,
};
use tokio::{io::unix::AsyncFd, time::Instant};

use super::{advice, foreign, forwarding::Change, legacy, nft, table};

/// Scripts and services change the firewall in several steps; they are let finish.
const SETTLE: Duration = Duration::from_secs(1);
/// Between two looks: listing a large ruleset takes a while, and some firewalls change all the time.
const PAUSE: Duration = Duration::from_secs(10);

/// What the kernel says about changes to nftables; only that there was one counts.
pub struct Notices {
    socket: AsyncFd<OwnedFd>,
}

impl Notices {
    /// Begins to listen. `None`, said at DEBUG, where that is not to be had: then there is one look, at the start.
    pub fn listen() -> Option<Self> {
        let open = || -> io::Result<Self> {
            /// NFNLGRP_NFTABLES, linux/netfilter/nfnetlink.h.
            const GROUP: u32 = 7;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
            bind(&socket, &SocketAddrNetlink::new(0, 1 << (GROUP - 1)))?;
            #[expect(
                deprecated,
                reason = "an OwnedFd stays open and the same while it lives, which is all that the unsafe successor asks for"
            )]
            let socket = AsyncFd::new(socket)?;
            Ok(Self { socket })
        };
        open().inspect_err(|e| tracing::debug!("No notices about changes of nftables: {e}")).ok()
    }

    /// Returns when something has changed since the last time.
    async fn next(&self) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { return std::future::pending().await };
            let heard = self.drain();
            ready.clear_ready();
            if heard {
                return;
            }
        }
    }

    /// Forgets what has been said so far; whether it was anything.
    fn drain(&self) -> bool {
        let mut heard = false;
        let mut buffer = [0; 4096];
        loop {
            match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                // A notice that did not fit, or many that were lost (ENOBUFS), are a change too.
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => heard = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return heard,
            }
        }
    }
}

/// Never ends by itself. `installed`: there was a table to look after.
pub async fn run(notices: Option<Notices>, tun: &'static str, changes: Vec<Change>, installed: bool) {
    let mut said = BTreeSet::new();
    loop {
        let looked = Instant::now();
        look(tun, &mut said).await;
        let Some(notices) = &notices else { return };
        notices.next().await;
        tokio::time::sleep_until((looked + PAUSE).max(Instant::now() + SETTLE)).await;
        notices.drain();
        if installed {
            mend(tun, &changes).await;
        }
    }
}

/// Makes the table again if somebody has removed it.
async fn mend(tun: &str, changes: &[Change]) {
    match nft::list(Some(table::TABLE)).await {
        Err(e) if e.is_absence() => {}
        _ => return,
    }
    match nft::apply(&table::install(tun, changes)).await {
        Ok(()) => tracing::info!("Somebody removed the nftables table {}; it is there again", table::TABLE),
        Err(e) => tracing::warn!("{}", super::no_table(&e)),
    }
}

/// Says what of others' rules drops clients' packets; what was said stays in `said`, and is said again only after it was gone.
async fn look(tun: &str, said: &mut BTreeSet<String>) {
    let objects = match nft::list(None).await {
        Ok(objects) => objects,
        // If that is a fault, the set-up has said so.
        Err(e) => return tracing::debug!("The rules of others are not known, because {e}"),
    };
    let owned = tun.to_owned();
    let search = move || foreign::findings(&objects, &owned, &foreign::devices());
    let findings = tokio::task::spawn_blocking(search).await.unwrap_or_default();
    let (mut sure, mut perhaps) = (Vec::new(), Vec::new());
    for finding in findings {
        let list = if finding.sure { &mut sure } else { &mut perhaps };
        list.push(advice::sentence(&finding, tun));
    }
    sure.extend(legacy::findings(tun).await);
    sure.iter()
        .filter(|sentence| !said.contains(*sentence))
        .for_each(|sentence| tracing::warn!("{sentence}"));
    perhaps
        .iter()
        .filter(|sentence| !said.contains(*sentence))
        .for_each(|sentence| tracing::info!("{sentence}"));
    *said = sure.into_iter().chain(perhaps).collect();
}

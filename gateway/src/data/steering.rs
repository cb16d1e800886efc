//! Keeps the maps by which the kernel steers packets at what the workers are told.
//!
//! A new client is entered at once; one that moves when it has arrived, so that its packets reach whoever holds it.
//! A packet that comes in between, or that the maps do not know, is passed on by the worker it reaches.

use std::{net::IpAddr, os::fd::AsFd as _};

use anyhow::Result;
use gateway_proto::{
    ClientId, Command, ConnectionIndex, WorkerEvent, WorkerId,
    addr::TunnelAddrs,
    command::{ClientState, Connection},
};
use rustc_hash::FxHashMap;

use super::{
    capabilities::{Capability, InUse},
    tun::Tun,
    udp::Sockets,
};
use crate::bpf;

/// The kernel's maps, or a test's.
pub trait Maps {
    /// See [`bpf::Owners::set_session`].
    fn set_session(&mut self, connection: ConnectionIndex, worker: Option<WorkerId>);
    /// See [`bpf::Owners::set_tunnel`].
    fn set_tunnel(&mut self, tunnel: IpAddr, worker: Option<WorkerId>);
}

impl Maps for bpf::Owners {
    fn set_session(&mut self, connection: ConnectionIndex, worker: Option<WorkerId>) {
        self.set_session(connection, worker);
    }
    fn set_tunnel(&mut self, tunnel: IpAddr, worker: Option<WorkerId>) {
        self.set_tunnel(tunnel, worker);
    }
}

/// Attaches the steering programs of `kernel` for several workers, as far as that is allowed and possible; says in
/// `in_use` what is not. An error instead of a kernel is why there is none.
pub fn attach(
    kernel: Result<&mut bpf::Kernel, &anyhow::Error>,
    sockets: &[Sockets],
    tuns: &[Tun],
    in_use: &mut InUse,
) {
    let [first, _, ..] = tuns else {
        BOTH.iter().for_each(|capability| in_use.missing(*capability, "one worker"));
        return;
    };
    let plane = match kernel {
        Ok(kernel) => &mut kernel.plane,
        Err(e) => {
            BOTH.iter().for_each(|capability| in_use.missing(*capability, e.to_string()));
            return;
        }
    };
    if in_use.has(Capability::ReuseportSteering)
        && let Err(e) = attach_sockets(plane, sockets)
    {
        in_use.missing(Capability::ReuseportSteering, format!("{e:#}"));
    }
    if in_use.has(Capability::TunSteering)
        && let Err(e) = plane.attach_tun(first.as_fd())
    {
        in_use.missing(Capability::TunSteering, format!("{e:#}"));
    }
}

/// What the steering programs are for.
pub const BOTH: [Capability; 2] = [Capability::ReuseportSteering, Capability::TunSteering];

fn attach_sockets(plane: &mut bpf::KernelPlane, sockets: &[Sockets]) -> Result<()> {
    for v6 in [false, true] {
        let group: Vec<_> =
            sockets.iter().filter_map(|of| if v6 { of.v6.as_ref() } else { of.v4.as_ref() }).collect();
        let group: Vec<_> = group.into_iter().map(|socket| socket.as_fd()).collect();
        if !group.is_empty() {
            plane.attach_sockets(v6, &group)?;
        }
    }
    Ok(())
}

/// What the kernel was told of each client.
#[derive(Default)]
pub struct Steering {
    clients: FxHashMap<ClientId, Entry>,
}

struct Entry {
    /// Where its packets are brought.
    worker: WorkerId,
    /// The decision it was made by, see [`gateway_proto::command::Home::order`].
    order: u64,
    index: Option<ConnectionIndex>,
    tunnel: TunnelAddrs,
}

impl Steering {
    /// What the workers are about to be told.
    pub fn on_command(&mut self, command: &Command, maps: &mut impl Maps) {
        let Command::Client { id, home, desired } = command else { return };
        let Some(state) = desired else { return self.forget(*id, maps) };
        let old = self.clients.get(id);
        let worker = match home.from {
            // It stays where it was until it has arrived.
            Some(from) => old.map_or(from, |old| old.worker),
            None => home.worker,
        };
        let entry = Entry { worker, order: home.order, index: index_of(state), tunnel: state.tunnel };
        self.enter(*id, entry, maps);
    }

    /// What a worker said.
    pub fn on_event(&mut self, event: &WorkerEvent, maps: &mut impl Maps) {
        let WorkerEvent::Adopted { id, worker, order } = event else { return };
        if let Some(&Entry { index, tunnel, .. }) = self.clients.get(id).filter(|entry| entry.order == *order)
        {
            self.enter(*id, Entry { worker: *worker, order: *order, index, tunnel }, maps);
        }
    }

    /// Only what differs from before is written: commands repeat most of what is known.
    fn enter(&mut self, id: ClientId, new: Entry, maps: &mut impl Maps) {
        let old = self.clients.remove(&id);
        let same_worker = old.as_ref().is_some_and(|old| old.worker == new.worker);
        let old_index = old.as_ref().and_then(|old| old.index);
        let old_tunnel = old.as_ref().map(|old| old.tunnel);
        if old_index != new.index || !same_worker {
            if let Some(index) = new.index {
                maps.set_session(index, Some(new.worker));
            }
            if let Some(index) = old_index.filter(|old| Some(*old) != new.index) {
                maps.set_session(index, None);
            }
        }
        if old_tunnel != Some(new.tunnel) || !same_worker {
            if let Some(tunnel) = old_tunnel {
                addresses(tunnel, new.tunnel).for_each(|gone| maps.set_tunnel(gone, None));
            }
            for address in [IpAddr::from(new.tunnel.v4), new.tunnel.v6.into()] {
                maps.set_tunnel(address, Some(new.worker));
            }
        }
        self.clients.insert(id, new);
    }

    fn forget(&mut self, id: ClientId, maps: &mut impl Maps) {
        let Some(old) = self.clients.remove(&id) else { return };
        if let Some(index) = old.index {
            maps.set_session(index, None);
        }
        for address in [IpAddr::from(old.tunnel.v4), old.tunnel.v6.into()] {
            maps.set_tunnel(address, None);
        }
    }
}

/// The addresses of `old` that `new` does not have.
fn addresses(old: TunnelAddrs, new: TunnelAddrs) -> impl Iterator<Item = IpAddr> {
    let v4 = (old.v4 != new.v4).then_some(old.v4.into());
    let v6 = (old.v6 != new.v6).then_some(old.v6.into());
    [v4, v6].into_iter().flatten()
}

fn index_of(state: &ClientState) -> Option<ConnectionIndex> {
    match &state.connection {
        Connection::Absent => None,
        Connection::Present(keys, _) => Some(keys.index),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use gateway_proto::command::{ConnectionKeys, Home};
    use uuid::Uuid;
    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn maps_follow_clients_and_moves_only_when_they_are_over() {
        let (mut steering, maps) = (Steering::default(), &mut Written::default());
        let id = ClientId(Uuid::from_u128(1));
        let worker = |n| WorkerId::new(n).expect("below 64");
        let client = |home, state| Command::Client { id, home, desired: state };
        let home = |to, from, order| Home { worker: worker(to), from, order };
        let adopted = |to, order| WorkerEvent::Adopted { id, worker: worker(to), order };

        steering.on_command(&client(home(1, None, 1), Some(state(7, Some(5)))), maps);
        assert_eq!(maps.shown(), "5 -> 1; 100.64.0.7 -> 1; fd00:2021:1111::7 -> 1");
        steering.on_command(&client(home(2, Some(worker(1)), 2), Some(state(7, Some(5)))), maps);
        assert_eq!(maps.shown(), "5 -> 1; 100.64.0.7 -> 1; fd00:2021:1111::7 -> 1", "it is on its way");
        steering.on_event(&adopted(3, 1), maps);
        steering.on_command(&client(home(2, Some(worker(1)), 2), Some(state(8, Some(6)))), maps);
        assert_eq!(maps.shown(), "6 -> 1; 100.64.0.8 -> 1; fd00:2021:1111::8 -> 1");
        let before = maps.writes;
        steering.on_event(&adopted(2, 2), maps);
        assert_eq!(maps.shown(), "6 -> 2; 100.64.0.8 -> 2; fd00:2021:1111::8 -> 2");
        assert_eq!(maps.writes - before, 3);
        steering.on_command(&client(home(2, None, 2), Some(state(8, Some(6)))), maps);
        assert_eq!(maps.writes - before, 3, "nothing new");
        steering.on_command(&client(home(2, None, 2), Some(state(8, None))), maps);
        assert_eq!(maps.shown(), "100.64.0.8 -> 2; fd00:2021:1111::8 -> 2");
        steering.on_command(&client(home(0, None, 3), None), maps);
        assert_eq!(maps.shown(), "");
        steering.on_event(&adopted(2, 2), maps);
        assert!(maps.shown().is_empty() && steering.clients.is_empty());
    }

    #[derive(Default)]
    struct Written {
        sessions: BTreeMap<u32, WorkerId>,
        tunnels: BTreeMap<IpAddr, WorkerId>,
        writes: usize,
    }

    impl Written {
        fn shown(&self) -> String {
            let sessions = self.sessions.iter().map(|(key, worker)| format!("{key} -> {worker}"));
            let tunnels = self.tunnels.iter().map(|(key, worker)| format!("{key} -> {worker}"));
            sessions.chain(tunnels).collect::<Vec<_>>().join("; ")
        }
    }

    impl Maps for Written {
        fn set_session(&mut self, connection: ConnectionIndex, worker: Option<WorkerId>) {
            self.writes += 1;
            match worker {
                Some(worker) => self.sessions.insert(connection.get(), worker),
                None => self.sessions.remove(&connection.get()),
            };
        }

        fn set_tunnel(&mut self, tunnel: IpAddr, worker: Option<WorkerId>) {
            self.writes += 1;
            match worker {
                Some(worker) => self.tunnels.insert(tunnel, worker),
                None => self.tunnels.remove(&tunnel),
            };
        }
    }

    fn state(address: u8, index: Option<u32>) -> Arc<ClientState> {
        let keys = index.map(|index| ConnectionKeys {
            index: ConnectionIndex::new(index).expect("24 bits"),
            public_key: [1; 32],
            preshared_key: Zeroizing::new([2; 32]),
            ufrag: *b"abcd",
        });
        let tunnel = TunnelAddrs {
            v4: [100, 64, 0, address].into(),
            v6: [0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, address.into()].into(),
        };
        let connection = keys.map_or(Connection::Absent, |keys| Connection::Present(Arc::new(keys), None));
        Arc::new(ClientState::new(tunnel, connection, Arc::new([])))
    }
}

//! Names that are being looked up, and who waits for them (dns.md section 5.2). One look-up serves all that wait for one
//! name. Knows no resource and no answer.
//!
//! Whoever looks up answers each name once, within 10 s; nothing else ends a wait.

use std::{net::IpAddr, sync::Arc};

use rustc_hash::FxHashMap;

use crate::{
    ids::{ClientId, ConnectionIndex, ResourceId},
    names::{AssignedIps, DomainName},
};

/// Names that are looked up at a time, for all clients (dns.md section 5.2).
const NAMES: usize = 1000;
/// Waits of one client: it must not take all of [`NAMES`].
const WAITS: usize = 250;

/// Who waits for what.
#[derive(Debug, Default)]
pub(super) struct Resolutions {
    names: FxHashMap<DomainName, Vec<Waiter>>,
    waits: FxHashMap<ClientId, usize>,
}

/// A client that assigned addresses to a name under a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiter {
    pub(super) client: ClientId,
    pub(super) index: ConnectionIndex,
    pub(super) resource: ResourceId,
    /// See [`AssignedIps::said`].
    pub(super) said: Arc<str>,
    /// See [`AssignedIps::proxies`].
    pub(super) proxies: Vec<IpAddr>,
}

/// What is to be done for one that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Look the name up.
    LookUp,
    /// Somebody waits for it already.
    Merged,
    /// Nothing: too much is being looked up.
    Refused,
}

impl Resolutions {
    /// The client waits for its name from now on; what it said before of the same name and resource is forgotten.
    pub(super) fn wait(&mut self, client: ClientId, index: ConnectionIndex, assigned: AssignedIps) -> Wait {
        let AssignedIps { resource, said, domain, proxies } = assigned;
        let waiter = Waiter { client, index, resource, said, proxies };
        let known = self.names.get_mut(&domain);
        let is_new = known.is_none();
        if let Some(same) = known
            .and_then(|waiters| waiters.iter_mut().find(|w| (w.client, w.resource) == (client, resource)))
        {
            *same = waiter;
            return Wait::Merged;
        }
        let waits = self.waits.get(&client).copied().unwrap_or_default();
        if waits >= WAITS || (is_new && self.names.len() >= NAMES) {
            return Wait::Refused;
        }
        self.waits.insert(client, waits + 1);
        self.names.entry(domain).or_default().push(waiter);
        if is_new { Wait::LookUp } else { Wait::Merged }
    }

    /// The name is looked up: who waited for it, in the order they came.
    pub(super) fn take(&mut self, name: &DomainName) -> Vec<Waiter> {
        let waiters = self.names.remove(name).unwrap_or_default();
        for waiter in &waiters {
            if let Some(waits) = self.waits.get_mut(&waiter.client) {
                *waits -= 1;
                if *waits == 0 {
                    self.waits.remove(&waiter.client);
                }
            }
        }
        waiters
    }

    /// How many names are being looked up.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn wait(all: &mut Resolutions, client: u128, resource: u128, domain: &str) -> Wait {
        let resource = ResourceId(Uuid::from_u128(resource));
        let (name, said) = (DomainName::parse(domain).unwrap(), domain.into());
        let assigned = AssignedIps { resource, said, domain: name, proxies: vec![] };
        all.wait(ClientId(Uuid::from_u128(client)), ConnectionIndex::new(1).unwrap(), assigned)
    }

    fn take(all: &mut Resolutions, domain: &str) -> Vec<(u128, u128, String)> {
        let brief = |w: Waiter| (w.client.0.as_u128(), w.resource.0.as_u128(), w.said.to_string());
        all.take(&DomainName::parse(domain).unwrap()).into_iter().map(brief).collect()
    }

    #[test]
    fn one_look_up_serves_all_and_the_latest_word_of_each_counts() {
        let mut all = Resolutions::default();
        for (client, resource, domain, expect) in [
            (1, 1, "x.net", Wait::LookUp),
            (2, 1, "X.net", Wait::Merged),
            (1, 1, "x.NET", Wait::Merged),
            (1, 2, "x.net", Wait::Merged),
            (1, 1, "y.net", Wait::LookUp),
        ] {
            assert_eq!(wait(&mut all, client, resource, domain), expect, "{client} {resource} {domain}");
        }
        let expect = [(1, 1, "x.NET"), (2, 1, "X.net"), (1, 2, "x.net")];
        assert_eq!(take(&mut all, "x.net"), expect.map(|(c, r, said)| (c, r, said.to_owned())));
        assert_eq!(take(&mut all, "x.net"), []);
        assert_eq!(wait(&mut all, 1, 1, "x.net"), Wait::LookUp, "it is looked up anew");
        take(&mut all, "x.net");
        assert_eq!(take(&mut all, "y.net").len(), 1);
        assert!(all.names.is_empty() && all.waits.is_empty());
    }

    #[test]
    fn neither_one_client_nor_all_wait_for_too_much() {
        let mut all = Resolutions::default();
        for n in 0..WAITS {
            assert_eq!(wait(&mut all, 1, 1, &format!("n{n}.net")), Wait::LookUp);
        }
        assert_eq!(wait(&mut all, 1, 1, "more.net"), Wait::Refused);
        assert_eq!(wait(&mut all, 1, 1, "n0.net"), Wait::Merged, "it waits for that already");
        assert_eq!(wait(&mut all, 1, 2, "n0.net"), Wait::Refused);
        for n in WAITS..NAMES {
            assert_eq!(wait(&mut all, 2 + n as u128, 1, &format!("n{n}.net")), Wait::LookUp);
        }
        assert_eq!(wait(&mut all, 9999, 1, "more.net"), Wait::Refused);
        assert_eq!(wait(&mut all, 9999, 1, "n0.net"), Wait::Merged);
        assert_eq!(take(&mut all, "n0.net").len(), 2);
        assert_eq!(wait(&mut all, 1, 1, "more.net"), Wait::LookUp, "there is room again");
    }
}

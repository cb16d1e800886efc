//! What one client may reach and until when (packets.md section 4.6, portal-protocol.md section 8).
//!
//! Also the authorizations that wait for a relay. Nothing in here knows connections, the portal or the workers.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    flow::{Attribution, Attributions},
    ids::{ClientId, ResourceId},
    names::DomainName,
    pattern::Pattern,
    portal::messages::{Authorize, Resource, ResourceKind, UnixSeconds},
};

/// Granted less than this before an `init` that does not list it: the portal writes authorizations about 1 s late
/// (portal-protocol.md section 14, no. 12), so its list may be older than the grant.
pub(super) const RESYNC_GRACE: Duration = Duration::from_secs(5);
/// The wall clock may be off by so much before deadlines follow it: the portal counts in seconds.
const STEP: Duration = Duration::from_millis(250);
/// How long an authorization waits for a relay. The portal gives up 15 s after it asked (portal-protocol.md 8.2).
const PARKING: Duration = Duration::from_secs(12);
/// Authorizations that may wait at a time; the oldest goes first.
const PARKING_PLACES: usize = 4096;

/// One client's authorizations.
#[derive(Debug, Default)]
pub(super) struct Authorizations {
    granted: BTreeMap<ResourceId, Authorization>,
    /// All resources, shared with the workers; `None` after a change.
    complete: Option<Arc<[Resource]>>,
    /// The same for the attributions.
    attributions: Option<Attributions>,
}

#[derive(Debug)]
struct Authorization {
    resource: Resource,
    /// Of a DNS resource whose address is one: the address never changes.
    pattern: Option<Pattern>,
    /// By the wall clock, as the portal said it; `None` is never.
    expires: Option<UnixSeconds>,
    granted: Instant,
    /// By the ingest token that came with it last.
    attribution: Option<Arc<Attribution>>,
}

/// What became of a changed resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Update {
    /// The filters are the new ones (or were the same).
    Applied,
    /// Type or address differ: only filters can change (packets.md section 4.6).
    Refused,
    /// The client does not hold it.
    Unknown,
}

impl Authorizations {
    /// Adds the resource, or renews it: filters and expiry are replaced.
    pub(super) fn grant(&mut self, resource: Resource, expires: Option<UnixSeconds>, now: Instant) -> Update {
        let id = resource.id;
        let update = self.update(&resource);
        match self.granted.get_mut(&id) {
            Some(known) => (known.expires, known.granted) = (expires, now),
            None => {
                let pattern = match &resource.kind {
                    ResourceKind::Dns { pattern, .. } => Pattern::new(pattern),
                    _ => None,
                };
                let new = Authorization { resource, pattern, expires, granted: now, attribution: None };
                self.granted.insert(id, new);
                self.complete = None;
            }
        }
        update
    }

    /// Whom the flows to the resource are attributed to from now on.
    pub(super) fn attribute(&mut self, resource: ResourceId, attribution: Option<Arc<Attribution>>) {
        if let Some(known) = self.granted.get_mut(&resource)
            && known.attribution != attribution
        {
            known.attribution = attribution;
            self.attributions = None;
        }
    }

    /// Replaces the filters of a resource that the client holds.
    pub(super) fn update(&mut self, new: &Resource) -> Update {
        let Some(known) = self.granted.get_mut(&new.id) else { return Update::Unknown };
        let filters = match (&mut known.resource.kind, &new.kind) {
            (ResourceKind::Internet, ResourceKind::Internet) => return Update::Applied,
            (ResourceKind::Cidr { filters, .. }, ResourceKind::Cidr { filters: new, .. })
            | (ResourceKind::Dns { filters, .. }, ResourceKind::Dns { filters: new, .. }) => (filters, new),
            _ => return Update::Refused,
        };
        if filters.0 != filters.1 {
            filters.0.clone_from(filters.1);
            self.complete = None;
        }
        if same_destination(&known.resource.kind, &new.kind) { Update::Applied } else { Update::Refused }
    }

    /// Takes a resource away; false if the client did not hold it.
    pub(super) fn revoke(&mut self, resource: ResourceId) -> bool {
        let held = self.granted.remove(&resource).is_some();
        if held {
            (self.complete, self.attributions) = (None, None);
        }
        held
    }

    /// A new expiry; false if the client does not hold the resource.
    pub(super) fn set_expiry(&mut self, resource: ResourceId, expires: Option<UnixSeconds>) -> bool {
        self.granted.get_mut(&resource).map(|a| a.expires = expires).is_some()
    }

    /// Keeps what `listed` knows, with the expiry it says, and what was granted within [`RESYNC_GRACE`].
    ///
    /// Returns what was taken away.
    pub(super) fn resync(
        &mut self,
        listed: impl Fn(ResourceId) -> Option<Option<UnixSeconds>>,
        now: Instant,
    ) -> Vec<ResourceId> {
        self.take_unless(|id, authorization| match listed(id) {
            Some(expires) => {
                authorization.expires = expires;
                true
            }
            None => now.duration_since(authorization.granted) < RESYNC_GRACE,
        })
    }

    /// Takes away what ended at `now` or earlier and returns it.
    pub(super) fn expire(&mut self, clock: &WallClock, now: Instant) -> Vec<ResourceId> {
        if self.next_expiry(clock).is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.take_unless(|_, authorization| clock.deadline(authorization.expires).is_none_or(|at| at > now))
    }

    /// When the first one ends, by what the wall clock says now.
    pub(super) fn next_expiry(&self, clock: &WallClock) -> Option<Instant> {
        clock.deadline(self.granted.values().filter_map(|a| a.expires).min())
    }

    /// Is this name to be reached under this resource?
    ///
    /// # Errors
    /// Why not.
    pub(super) fn permits(&self, resource: ResourceId, name: &DomainName) -> Result<(), &'static str> {
        let known = self.granted.get(&resource).ok_or("a resource without access")?;
        match (&known.resource.kind, &known.pattern) {
            (ResourceKind::Dns { .. }, Some(pattern)) if pattern.matches(name) => Ok(()),
            (ResourceKind::Dns { .. }, Some(_)) => Err("the resource's pattern does not match"),
            (ResourceKind::Dns { .. }, None) => Err("the resource's address is no pattern"),
            _ => Err("the resource is not reached by names"),
        }
    }

    /// Is it a DNS resource whose address is no pattern, so that no name will ever match it?
    pub(super) fn is_unmatchable(&self, resource: ResourceId) -> bool {
        let known = self.granted.get(&resource);
        known.is_some_and(|a| a.pattern.is_none() && matches!(a.resource.kind, ResourceKind::Dns { .. }))
    }

    /// Has the client nothing left?
    pub(super) fn is_empty(&self) -> bool {
        self.granted.is_empty()
    }

    /// Everything the client may reach, and until when.
    pub(super) fn with_expiry(&self) -> impl Iterator<Item = (&Resource, Option<UnixSeconds>)> {
        self.granted.values().map(|a| (&a.resource, a.expires))
    }

    /// Everything the client may reach, for the workers.
    pub(super) fn resources(&mut self) -> Arc<[Resource]> {
        let granted = &self.granted;
        Arc::clone(
            self.complete.get_or_insert_with(|| granted.values().map(|a| a.resource.clone()).collect()),
        )
    }

    /// Whom flows are attributed to, for the workers; ascending by resource.
    pub(super) fn attributions(&mut self) -> Attributions {
        let granted = &self.granted;
        let all = || {
            granted.iter().filter_map(|(id, a)| Some((*id, Arc::clone(a.attribution.as_ref()?)))).collect()
        };
        Arc::clone(self.attributions.get_or_insert_with(all))
    }

    fn take_unless(
        &mut self,
        mut keep: impl FnMut(ResourceId, &mut Authorization) -> bool,
    ) -> Vec<ResourceId> {
        let mut taken = Vec::new();
        self.granted.retain(|id, authorization| {
            let kept = keep(*id, authorization);
            if !kept {
                taken.push(*id);
            }
            kept
        });
        if !taken.is_empty() {
            (self.complete, self.attributions) = (None, None);
        }
        taken
    }
}

/// Names are for display; network, pattern and type are what an authorization is about.
fn same_destination(a: &ResourceKind, b: &ResourceKind) -> bool {
    match (a, b) {
        (ResourceKind::Cidr { network: a, .. }, ResourceKind::Cidr { network: b, .. }) => a == b,
        (ResourceKind::Dns { pattern: a, .. }, ResourceKind::Dns { pattern: b, .. }) => a == b,
        (ResourceKind::Internet, ResourceKind::Internet) => true,
        _ => false,
    }
}

/// Where wall clock and monotonic clock met last: turns the portal's Unix times into deadlines.
///
/// A deadline holds until the wall clock is set; that is why the portal's times are kept, and not deadlines.
#[derive(Debug, Clone, Copy)]
pub(super) struct WallClock {
    unix: Duration,
    at: Instant,
}

impl WallClock {
    /// `unix` is the time since 1970 at `at`.
    pub(super) fn new(unix: Duration, at: Instant) -> Self {
        Self { unix, at }
    }

    /// The wall clock shows `unix` at `at`. True if deadlines must be reckoned anew; what a clock that is corrected
    /// bit by bit is off by adds up until it is worth it.
    pub(super) fn set(&mut self, unix: Duration, at: Instant) -> bool {
        let expected = self.unix + at.saturating_duration_since(self.at);
        let stepped = expected.abs_diff(unix) >= STEP;
        if stepped {
            *self = Self { unix, at };
        }
        stepped
    }

    /// The deadline for a time; one that is past is due at once, one beyond reckoning never.
    pub(super) fn deadline(&self, unix: Option<UnixSeconds>) -> Option<Instant> {
        let ahead = Duration::from_secs(unix?.0).saturating_sub(self.unix);
        self.at.checked_add(ahead)
    }
}

/// Authorizations that came while no relay was usable, in the order they came.
#[derive(Debug, Default)]
pub(super) struct Parked {
    waiting: VecDeque<(Instant, Box<Authorize>)>,
}

impl Parked {
    /// It waits from `now` on; an earlier one for the same client and resource is replaced.
    pub(super) fn park(&mut self, authorize: Box<Authorize>, now: Instant) {
        self.reject(authorize.client.id, authorize.resource.id);
        if self.waiting.len() == PARKING_PLACES {
            self.waiting.pop_front();
        }
        self.waiting.push_back((now + PARKING, authorize));
    }

    /// Superseded by `reject_access`.
    pub(super) fn reject(&mut self, client: ClientId, resource: ResourceId) {
        self.waiting.retain(|(_, a)| a.client.id != client || a.resource.id != resource);
    }

    /// Superseded by `init`.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// The next one to serve, if it still waits.
    pub(super) fn take(&mut self, now: Instant) -> Option<Box<Authorize>> {
        self.expire(now);
        self.waiting.pop_front().map(|(_, authorize)| authorize)
    }

    /// Forgets those that waited too long and returns how many.
    pub(super) fn expire(&mut self, now: Instant) -> usize {
        let before = self.waiting.len();
        while self.waiting.front().is_some_and(|(until, _)| *until <= now) {
            self.waiting.pop_front();
        }
        before - self.waiting.len()
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// When the first one has waited too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.front().map(|(until, _)| *until)
    }
}

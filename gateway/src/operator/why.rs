//! `why`: what the policy says about a packet that an operator imagines, in words, with the cure.

use std::net::IpAddr;

use gateway_common::DropReason;
use gateway_proto::{
    addr::TunnelAddrs,
    control::ClientView,
    inquiry::{Answer, Imagined, Question, Verdict},
    portal::messages::ResourceKind,
    worker::inner::Transport,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    ask::{Asker, Known},
    status::Granted,
};

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// permitted, dropped or unknown.
    pub verdict: String,
    /// One sentence.
    pub words: String,
    /// What to do about it, if that is not what was wanted.
    pub cure: Option<String>,
    /// Whose packet it is.
    pub client: Option<String>,
    /// outbound or inbound.
    pub direction: Option<String>,
    /// Why it is dropped, as the metric's label.
    pub reason: Option<String>,
    /// What lets it through.
    pub resource: Option<Granted>,
    /// The name behind the proxy address that it goes to.
    pub domain: Option<String>,
    /// Where it goes instead of to a proxy address.
    pub translated_to: Option<String>,
    /// The client has a session now.
    pub has_session: Option<bool>,
}

/// Asks. `None` if somebody does not answer in time.
pub async fn look(asker: &Asker, packet: Imagined) -> Option<Value> {
    let answers = asker.workers(Question::Why(packet)).await?;
    let verdict = answers.into_iter().find_map(|answer| match answer {
        Answer::Why(verdict) => verdict,
        _ => None,
    });
    let Known { client, own } = asker.client(verdict.as_ref().map(|verdict| verdict.client)).await?;
    let told = match verdict {
        Some(verdict) => tell(&packet, verdict, client.as_ref()),
        None => nobodys(&packet, own),
    };
    serde_json::to_value(told).ok()
}

fn tell(packet: &Imagined, verdict: Verdict, client: Option<&ClientView>) -> Why {
    let granted = |id| {
        let resources = &client?.resources;
        let (resource, expires) = resources.iter().find(|(resource, _)| resource.id == id)?;
        Some(Granted { expires_at: expires.map(|expires| expires.0), ..Granted::from(resource) })
    };
    let what = describe(packet.transport, verdict.is_outbound);
    let way = match verdict.is_outbound {
        true => format!("{what} from client {} to {}", verdict.client, packet.dst),
        false => format!("{what} from {} to client {}", packet.src, verdict.client),
    };
    let (direction, has_session) =
        (if verdict.is_outbound { "outbound" } else { "inbound" }, verdict.has_session);
    let mut why = Why {
        verdict: String::new(),
        words: String::new(),
        cure: None,
        client: Some(verdict.client.to_string()),
        direction: Some(direction.to_owned()),
        reason: None,
        resource: None,
        domain: verdict.domain.map(|name| name.as_str().to_owned()),
        translated_to: None,
        has_session: Some(has_session),
    };
    match verdict.outcome {
        Ok(passed) => {
            why.resource = passed.by.and_then(granted);
            why.translated_to = passed.real.map(|real| real.to_string());
            let by = match (&why.resource, passed.by) {
                (Some(resource), _) => format!("resource {}", describe_resource(resource)),
                (None, Some(id)) => format!("resource {id}, which was taken back just now"),
                (None, None) => "the gateway itself, whose own address it is".to_owned(),
            };
            let to = match (&why.translated_to, &why.domain) {
                (Some(real), Some(name)) => format!("; it is translated to {real} ({name})"),
                (Some(real), None) => format!("; it is translated to {real}"),
                _ => String::new(),
            };
            "permitted".clone_into(&mut why.verdict);
            why.words = format!("Permitted: {way}, by {by}{to}.");
            why.cure = (!has_session).then(|| {
                "The client has no session now, so nothing arrives or leaves: look at its path and handshake in \
                 `status`"
                    .to_owned()
            });
        }
        Err(reason) => {
            "dropped".clone_into(&mut why.verdict);
            why.reason = Some(reason.label().to_owned());
            let remote = if verdict.is_outbound { packet.dst } else { packet.src };
            let near = client.map(|client| near_misses(client, remote)).unwrap_or_default();
            let (because, cure) = explain(reason, &near);
            why.words = format!("Dropped ({}): {way}: {because}.", reason.label());
            why.cure = Some(cure);
        }
    }
    why
}

/// It belongs to no client.
fn nobodys(packet: &Imagined, own: Option<TunnelAddrs>) -> Why {
    let Imagined { src, dst, .. } = packet;
    let ours = if own.is_some_and(|own| own.contains(*src)) { " (the gateway's own address)" } else { "" };
    Why {
        verdict: "unknown".to_owned(),
        words: format!(
            "Unknown: neither {src}{ours} nor {dst} is the tunnel address of a client that this gateway serves."
        ),
        cure: Some(
            "`status` lists the clients with their tunnel addresses; one is listed while it is authorized for at \
             least one resource of this gateway's site, and it asks for that when it first sends something there"
                .to_owned(),
        ),
        client: None,
        direction: None,
        reason: None,
        resource: None,
        domain: None,
        translated_to: None,
        has_session: None,
    }
}

/// Resources that contain the address and do not permit the packet.
fn near_misses(client: &ClientView, remote: IpAddr) -> Vec<Granted> {
    let covers =
        |kind: &ResourceKind| matches!(kind, ResourceKind::Cidr { network, .. } if network.contains(&remote));
    client.resources.iter().filter(|(r, _)| covers(&r.kind)).map(|(r, _)| Granted::from(r)).collect()
}

fn describe(transport: Transport, is_outbound: bool) -> String {
    let end = if is_outbound { "to" } else { "from" };
    match transport {
        Transport::Tcp { dst, .. } => format!("TCP {end} port {dst}"),
        Transport::Udp { dst, .. } => format!("UDP {end} port {dst}"),
        Transport::IcmpEcho | Transport::IcmpError | Transport::Icmp(_) => "ICMP".to_owned(),
        Transport::Other(number) => format!("protocol {number}"),
    }
}

/// For people.
pub fn describe_resource(resource: &Granted) -> String {
    let Granted { id, name, kind, address, filters, .. } = resource;
    if kind == "internet" {
        return format!("Internet ({id})");
    }
    let filters = if filters.is_empty() { "everything".to_owned() } else { filters.join(", ") };
    let name = if name.is_empty() { id } else { name };
    format!("{name} ({kind} {address}; permits {filters})")
}

/// Why, and what to do. What `why` can meet is here; the others are told by their label.
fn explain(reason: DropReason, near: &[Granted]) -> (String, String) {
    let near: Vec<_> = near.iter().map(describe_resource).collect();
    let (because, cure) = match reason {
        DropReason::NotAllowed | DropReason::InboundNotAllowed if !near.is_empty() => (
            format!("the client may reach {}, which does not permit this", near.join(" and ")),
            "Add the protocol and port to the resource's traffic restrictions in the portal",
        ),
        DropReason::NotAllowed => (
            "no resource that the client is authorized for contains this address".to_owned(),
            "Add a resource with this address and a policy for the user's group in the portal; for a name, let the \
             client look it up again: the gateway may have been started since",
        ),
        DropReason::InboundNotAllowed => (
            "no resource that the client is authorized for contains this sender".to_owned(),
            "Only what a client may reach may send to it: add a resource with this address in the portal",
        ),
        DropReason::PrivateDestination => (
            "the Internet resource does not reach private and special addresses".to_owned(),
            "Add a resource with this address or its network in the portal",
        ),
        DropReason::NoTranslation => (
            "the name behind this proxy address has no address of this family".to_owned(),
            "Look the name up on the gateway (`getent ahosts NAME`): it needs an A record for IPv4, an AAAA record for \
             IPv6",
        ),
        DropReason::TunnelDestination => (
            "the destination is another tunnel address, and clients do not reach each other".to_owned(),
            "Give the other machine a resource of its own, reached by an address outside the tunnel",
        ),
        DropReason::TunnelSource => (
            "the sender has a tunnel address, and clients do not reach each other".to_owned(),
            "Give the other machine a resource of its own, reached by an address outside the tunnel",
        ),
        DropReason::OwnAddressPort => (
            "it is the gateway's own address, where clients reach DNS (port 53535) and ping only".to_owned(),
            "Start the gateway with --allow-own-ip if clients are to reach its other services",
        ),
        DropReason::Multicast => {
            ("multicast does not pass the tunnel".to_owned(), "Use a unicast address of the service")
        }
        DropReason::ForeignSource => (
            "the client may send from its own tunnel addresses only".to_owned(),
            "Do not forward other machines' packets into the client's tunnel",
        ),
        DropReason::UnsupportedProtocol => (
            "this kind of packet is between neighbours, or cannot be translated for a name".to_owned(),
            "Use TCP, UDP or ping, or reach the resource by its address",
        ),
        other => (
            format!("it is counted as {}", other.label()),
            "Look at what the metric firezone_gateway_dropped_packets_total says about this reason",
        ),
    };
    (because, cure.to_owned())
}

#[cfg(test)]
mod tests {
    use gateway_proto::{
        ClientId, ResourceId,
        inquiry::Let,
        portal::messages::{Filter, Resource},
    };
    use uuid::Uuid;

    use super::*;

    fn client() -> ClientView {
        let kind = ResourceKind::Cidr {
            name: "office".to_owned(),
            network: "10.0.0.0/8".parse().unwrap(),
            filters: vec![Filter::Tcp { first: 80, last: 80 }],
        };
        let resource = Resource { id: ResourceId(Uuid::from_u128(1)), kind };
        ClientView {
            id: ClientId(Uuid::from_u128(7)),
            tunnel: TunnelAddrs {
                v4: "100.64.0.7".parse().unwrap(),
                v6: "fd00:2021:1111::7".parse().unwrap(),
            },
            worker: None,
            has_connection: true,
            kind: None,
            path: None,
            resources: vec![(resource, None)],
            names: Vec::new(),
        }
    }

    fn told(dst: &str, has_session: bool, outcome: Result<Let, DropReason>) -> Why {
        let packet = Imagined {
            src: "100.64.0.7".parse().unwrap(),
            dst: dst.parse().unwrap(),
            transport: Transport::Tcp { src: 22, dst: 22 },
        };
        let client = client();
        let verdict = Verdict { client: client.id, is_outbound: true, has_session, domain: None, outcome };
        tell(&packet, verdict, Some(&client))
    }

    #[test]
    fn words_name_the_resource_the_reason_and_the_cure() {
        let by = |n| Ok(Let { by: Some(ResourceId(Uuid::from_u128(n))), real: None });
        let real = Ok(Let { by: None, real: Some("10.1.1.1".parse().unwrap()) });
        let table = [
            ("10.0.0.1", by(1), "by resource office (cidr 10.0.0.0/8; permits tcp 80)", ""),
            ("10.0.0.1", by(2), "taken back just now", ""),
            ("100.96.0.1", real, "translated to 10.1.1.1", ""),
            ("10.0.0.1", Err(DropReason::NotAllowed), "may reach office", "traffic restrictions"),
            ("192.0.2.1", Err(DropReason::NotAllowed), "no resource", "Add a resource"),
            ("100.64.0.1", Err(DropReason::OwnAddressPort), "own address", "--allow-own-ip"),
            ("100.96.0.1", Err(DropReason::NoTranslation), "no address of this family", "AAAA"),
            ("192.168.0.1", Err(DropReason::PrivateDestination), "Internet resource", "Add a resource"),
        ];
        for (dst, outcome, words, cure) in table {
            let why = told(dst, true, outcome);
            assert_eq!(why.verdict, if outcome.is_ok() { "permitted" } else { "dropped" });
            assert_eq!(why.reason.as_deref(), outcome.err().map(DropReason::label));
            assert!(why.words.contains(words) && why.words.contains("TCP to port 22"), "{why:?}");
            assert!(why.cure.as_deref().unwrap_or_default().contains(cure), "{why:?}");
            assert_eq!(why.cure.is_none(), outcome.is_ok(), "{why:?}");
        }
        let without = told("10.0.0.1", false, by(1));
        assert!(without.cure.is_some_and(|cure| cure.contains("no session")));
    }

    /// What workers can say to `why` has words of its own; a bare label is for what they cannot.
    #[test]
    fn every_verdict_of_the_policy_has_a_cure_of_its_own() {
        for reason in [
            DropReason::NotAllowed,
            DropReason::InboundNotAllowed,
            DropReason::PrivateDestination,
            DropReason::NoTranslation,
            DropReason::TunnelDestination,
            DropReason::TunnelSource,
            DropReason::OwnAddressPort,
            DropReason::Multicast,
            DropReason::ForeignSource,
            DropReason::UnsupportedProtocol,
        ] {
            assert!(!explain(reason, &[]).0.contains("counted as"), "{reason:?}");
        }
        assert!(explain(DropReason::DataForged, &[]).0.contains("data_forged"));
    }
}

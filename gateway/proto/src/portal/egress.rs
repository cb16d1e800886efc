//! [`Egress`] to JSON (portal-protocol.md section 9). It must not know frames or references of messages.

use serde_json::{Value, json};

use super::{endpoint::Generation, messages::Egress};

/// Event name and payload of `message` on an endpoint of `generation`.
#[must_use]
pub fn encode(message: &Egress, generation: Generation) -> (&'static str, Value) {
    match message {
        Egress::Authorized { reference } => {
            // "An unknown event (including the other generation's acknowledgement name on the wrong endpoint) gets an
            // error reply": the name follows the endpoint.
            let event = match generation {
                Generation::V2 => "authorization_created",
                Generation::V1 => "flow_authorized",
            };
            (event, json!({ "ref": reference }))
        }
        Egress::BroadcastIceCandidates(client, candidates) => {
            ("broadcast_ice_candidates", json!({ "client_ids": [client], "candidates": candidates }))
        }
        Egress::BroadcastInvalidatedIceCandidates(client, candidates) => (
            "broadcast_invalidated_ice_candidates",
            json!({ "client_ids": [client], "candidates": candidates }),
        ),
        Egress::NoRelays => ("no_relays", json!({})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ClientId;

    #[test]
    fn each_message_has_the_name_and_payload_of_its_endpoint() {
        let id = "11b7a9b2-3c53-4d2c-8f41-7a0d9c2e5f60";
        let client = ClientId(id.parse().unwrap());
        let ack = Egress::Authorized { reference: "SFMyNTY.x".into() };
        let list = vec!["candidate:1 1 udp 2 192.0.2.1 3 typ host".to_owned()];
        let lists = json!({ "client_ids": [id], "candidates": list });
        let table = [
            (ack.clone(), Generation::V2, "authorization_created", json!({ "ref": "SFMyNTY.x" })),
            (ack, Generation::V1, "flow_authorized", json!({ "ref": "SFMyNTY.x" })),
            (
                Egress::BroadcastIceCandidates(client, list.clone()),
                Generation::V1,
                "broadcast_ice_candidates",
                lists.clone(),
            ),
            (
                Egress::BroadcastInvalidatedIceCandidates(client, list),
                Generation::V2,
                "broadcast_invalidated_ice_candidates",
                lists,
            ),
            (Egress::NoRelays, Generation::V2, "no_relays", json!({})),
        ];
        for (message, generation, event, payload) in table {
            assert_eq!(encode(&message, generation), (event, payload));
        }
    }
}

//! Flows as log lines: target `flow_logs`, TRACE (cli-and-service.md section 14.3). The token stands in none of them.

use gateway_proto::flow::{DeniedReport, FlowProtocol, FlowReport};

use super::record;

/// The target of all of them.
const TARGET: &str = "flow_logs";

/// Says that a flow began, or how it ended.
pub fn flow(report: &FlowReport) {
    if !tracing::enabled!(target: TARGET, tracing::Level::TRACE) {
        return;
    }
    // A macro, because a message and the set of fields are fixed where the event is written.
    macro_rules! line {
        ($message:literal $(, $name:ident = $value:expr)*) => {{
            let claims = &report.attribution.claims;
            let optional = &claims.optional;
            tracing::trace!(
                target: TARGET,
                protocol = report.protocol.label(),
                role = "responder",
                initiator_device_id = claims.initiator_device_id,
                responder_device_id = claims.responder_device_id,
                policy_authorization_id = %claims.policy_authorization_id,
                policy_id = claims.policy_id,
                resource_id = claims.resource_id,
                resource_name = claims.resource_name,
                resource_address = optional.resource_address,
                initiator_actor_id = claims.initiator_actor_id,
                initiator_actor_name = claims.initiator_actor_name,
                initiator_actor_email = optional.initiator_actor_email,
                initiator_auth_provider_id = optional.initiator_auth_provider_id,
                initiator_client_version = optional.initiator_client_version,
                initiator_device_os_name = optional.initiator_device_os_name,
                initiator_device_os_version = optional.initiator_device_os_version,
                initiator_device_serial = optional.initiator_device_serial,
                initiator_device_uuid = optional.initiator_device_uuid,
                initiator_device_identifier_for_vendor = optional.initiator_device_identifier_for_vendor,
                initiator_device_firebase_installation_id = optional.initiator_device_firebase_installation_id,
                authorized_at = claims.authorized_at,
                authorization_expires_at = claims.authorization_expires_at,
                inner_src_ip = %report.src.ip(),
                inner_src_port = report.src.port(),
                inner_dst_ip = %report.dst.ip(),
                inner_dst_port = report.dst.port(),
                domain = report.domain.as_ref().map(|domain| domain.as_str()),
                outers = %record::outers(&report.outers),
                flow_start = record::time(report.start),
                $($name = $value,)*
                $message
            );
        }};
        ($message:literal, $end:ident) => {
            line!(
                $message,
                flow_end = record::time($end.end),
                last_packet = record::time($end.last_packet),
                rx_packets = $end.rx_packets,
                tx_packets = $end.tx_packets,
                rx_bytes = $end.rx_bytes,
                tx_bytes = $end.tx_bytes
            )
        };
    }
    match (report.protocol, &report.end) {
        (FlowProtocol::Tcp, None) => line!("TCP flow started"),
        (FlowProtocol::Udp, None) => line!("UDP flow started"),
        (FlowProtocol::Tcp, Some(end)) => line!("TCP flow completed", end),
        (FlowProtocol::Udp, Some(end)) => line!("UDP flow completed", end),
    }
}

/// Says that a packet was not let through, and how many were not worth a line of their own since the last.
pub fn denied(report: &DeniedReport) {
    tracing::trace!(
        target: TARGET,
        client = %report.client,
        reason = report.reason.label(),
        protocol = report.protocol,
        inner_src_ip = %report.src,
        inner_src_port = report.ports.map(|ports| ports.0),
        inner_dst_ip = %report.dst,
        inner_dst_port = report.ports.map(|ports| ports.1),
        at = record::time(report.at),
        suppressed = report.suppressed,
        "Packet denied"
    );
}

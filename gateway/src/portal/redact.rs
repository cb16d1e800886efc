//! Portal messages for the wire log, without their secrets. Upstream's wire trace prints preshared keys, TURN passwords
//! and ingest tokens (portal-protocol.md section 14 item 19).

use serde_json::Value;

const HIDDEN: &str = "[redacted]";

/// `text` with the value of every member that can hold a secret replaced; text that is not JSON is not shown at all.
pub fn redact(text: &str) -> String {
    match serde_json::from_str::<Value>(text) {
        Ok(mut value) => {
            hide(&mut value);
            value.to_string()
        }
        Err(_) => format!("[{} bytes, not JSON]", text.len()),
    }
}

fn hide(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                if is_secret(name) { *value = Value::from(HIDDEN) } else { hide(value) }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// By part of the name, so that a member a newer portal invents is hidden too. ICE parameters are the old name of ICE
/// credentials.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let parts =
        ["preshared", "psk", "password", "token", "secret", "credential", "ice_parameters", "private"];
    parts.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_of_a_recorded_session_survives() {
        let sample = include_str!("../../proto/tests/samples/nov25-relayed.gateway.jsonl");
        let mut secrets = 0;
        for line in sample.lines() {
            let redacted = redact(line);
            let mut found = Vec::new();
            collect(&serde_json::from_str(line).unwrap(), &mut found);
            for secret in &found {
                assert!(!redacted.contains(secret.as_str()), "{secret} is in {redacted}");
            }
            secrets += found.len();
        }
        // One relay password; per authorization a PSK, two ICE passwords and an ingest token; the login token.
        assert_eq!(secrets, 1 + 3 * 4 + 1);
    }

    #[test]
    fn names_and_candidates_stay_readable() {
        let text = r#"{"event":"ice_candidates","payload":{"candidates":["candidate:1"],"client_id":"c"},"ref":null}"#;
        assert_eq!(redact(text), text);
        assert_eq!(redact("token=abc"), "[9 bytes, not JSON]");
        let legacy = r#"{"client":{"payload":{"ice_parameters":{"username":"u","password":"p"}},"list":[{"Token":[1]}]}}"#;
        assert_eq!(
            redact(legacy),
            r#"{"client":{"list":[{"Token":"[redacted]"}],"payload":{"ice_parameters":"[redacted]"}}}"#
        );
    }

    /// The texts under the names the protocol uses for secrets, found by another way than `hide`.
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                for (name, value) in members {
                    match (name.as_str(), value.as_str()) {
                        ("preshared_key" | "password" | "token" | "flow_logs_ingest_token", Some(secret)) => {
                            found.push(secret.to_owned());
                        }
                        _ => collect(value, found),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
}

//! The token that flow logs are uploaded under, and what it says about an authorization (portal-protocol.md section 11,
//! item 5). Its signature is for the portal to verify: what we read is taken for the portal's word because the token
//! came from the portal, and ids that become file names are checked by their types.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::{
    flow::Attribution,
    ids::PolicyAuthorizationId,
    portal::messages::{Secret, UnixSeconds},
};

/// Bytes of the longest token that is used. No server takes a longer header, and its claims go with each record.
pub const MAX_TOKEN: usize = 16 << 10;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The account.
    pub account_id: String,
    /// When it was made.
    pub iat: UnixSeconds,
    /// When it ceases to be of use.
    pub exp: UnixSeconds,
    /// Records may be uploaded; if not, they are printed at most.
    pub uploads_enabled: bool,
    /// The authorization; also the name of its folder in the spool.
    pub policy_authorization_id: PolicyAuthorizationId,
    /// The client's device.
    pub initiator_device_id: String,
    /// The gateway's.
    pub responder_device_id: String,
    /// The policy.
    pub policy_id: String,
    /// The resource.
    pub resource_id: String,
    /// Its name.
    pub resource_name: String,
    /// Who uses the client.
    pub initiator_actor_id: String,
    /// Their name.
    pub initiator_actor_name: String,
    /// When access was granted.
    pub authorized_at: String,
    /// Until when.
    pub authorization_expires_at: String,
    /// What may be missing.
    pub optional: OptionalClaims,
}

/// Claims that a token may lack; one that is no text counts as missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "they are named as in the token and passed on as they are")]
pub struct OptionalClaims {
    pub resource_address: Option<String>,
    pub initiator_actor_email: Option<String>,
    pub initiator_auth_provider_id: Option<String>,
    pub initiator_client_version: Option<String>,
    pub initiator_device_os_name: Option<String>,
    pub initiator_device_os_version: Option<String>,
    pub initiator_device_serial: Option<String>,
    pub initiator_device_uuid: Option<String>,
    pub initiator_device_identifier_for_vendor: Option<String>,
    pub initiator_device_firebase_installation_id: Option<String>,
}

/// Why a token cannot be used. It says nothing of the token's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// More than [`MAX_TOKEN`] bytes.
    #[error("it is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Not three segments, or the second is no base64url of a JSON object (RFC 7519 section 7.2).
    #[error("it is no JSON Web Token")]
    Malformed,
    /// A required claim is missing or of the wrong type.
    #[error("its claim `{0}` is missing or not what it must be")]
    Claim(&'static str),
    /// It is the client's, not ours.
    #[error("its role is not `responder`")]
    Role,
    /// The id is not the canonical text of a UUID.
    #[error("its `policy_authorization_id` is not a UUID as it must be written")]
    AuthorizationId,
}

/// Reads a token.
///
/// # Errors
/// See [`TokenError`]: access does not depend on it, only what is logged about it.
pub fn parse(token: Secret) -> Result<Attribution, TokenError> {
    if token.0.len() > MAX_TOKEN {
        return Err(TokenError::TooLong);
    }
    let claims = {
        let mut segments = token.0.split('.');
        let (Some(_), Some(payload), Some(_), None) =
            (segments.next(), segments.next(), segments.next(), segments.next())
        else {
            return Err(TokenError::Malformed);
        };
        let json = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenError::Malformed)?;
        read(&serde_json::from_slice(&json).map_err(|_| TokenError::Malformed)?)?
    };
    Ok(Attribution { token, claims })
}

fn read(claims: &Map<String, Value>) -> Result<Claims, TokenError> {
    let maybe = |name: &str| claims.get(name)?.as_str().map(str::to_owned);
    let text = |name: &'static str| maybe(name).ok_or(TokenError::Claim(name));
    let time = |name: &'static str| {
        let seconds = claims.get(name).and_then(seconds).ok_or(TokenError::Claim(name))?;
        Ok(UnixSeconds(seconds))
    };
    if text("role")? != "responder" {
        return Err(TokenError::Role);
    }
    Ok(Claims {
        account_id: text("account_id")?,
        iat: time("iat")?,
        exp: time("exp")?,
        uploads_enabled: claims
            .get("uploads_enabled")
            .and_then(Value::as_bool)
            .ok_or(TokenError::Claim("uploads_enabled"))?,
        policy_authorization_id: authorization_id(&text("policy_authorization_id")?)?,
        initiator_device_id: text("initiator_device_id")?,
        responder_device_id: text("responder_device_id")?,
        policy_id: text("policy_id")?,
        resource_id: text("resource_id")?,
        resource_name: text("resource_name")?,
        initiator_actor_id: text("initiator_actor_id")?,
        initiator_actor_name: text("initiator_actor_name")?,
        authorized_at: text("authorized_at")?,
        authorization_expires_at: text("authorization_expires_at")?,
        optional: OptionalClaims {
            resource_address: maybe("resource_address"),
            initiator_actor_email: maybe("initiator_actor_email"),
            initiator_auth_provider_id: maybe("initiator_auth_provider_id"),
            initiator_client_version: maybe("initiator_client_version"),
            initiator_device_os_name: maybe("initiator_device_os_name"),
            initiator_device_os_version: maybe("initiator_device_os_version"),
            initiator_device_serial: maybe("initiator_device_serial"),
            initiator_device_uuid: maybe("initiator_device_uuid"),
            initiator_device_identifier_for_vendor: maybe("initiator_device_identifier_for_vendor"),
            initiator_device_firebase_installation_id: maybe("initiator_device_firebase_installation_id"),
        },
    })
}

/// NumericDate (RFC 7519 section 2) may have a fraction, which is cut off.
fn seconds(value: &Value) -> Option<u64> {
    let whole = |s: f64| Duration::try_from_secs_f64(s).ok().map(|time| time.as_secs());
    value.as_u64().or_else(|| value.as_f64().and_then(whole))
}

/// Only the text that we would write ourselves: lower case with hyphens, so that one id has one folder.
fn authorization_id(text: &str) -> Result<PolicyAuthorizationId, TokenError> {
    let id = Uuid::try_parse(text).ok().map(PolicyAuthorizationId);
    id.filter(|id| id.to_string() == text).ok_or(TokenError::AuthorizationId)
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use zeroize::Zeroizing;

    use super::*;

    const REQUIRED: [&str; 15] = [
        "account_id",
        "iat",
        "exp",
        "uploads_enabled",
        "role",
        "initiator_device_id",
        "responder_device_id",
        "policy_authorization_id",
        "policy_id",
        "resource_id",
        "resource_name",
        "initiator_actor_id",
        "initiator_actor_name",
        "authorized_at",
        "authorization_expires_at",
    ];

    #[test]
    fn a_whole_token_is_read_and_unknown_claims_are_tolerated() {
        let mut whole = claims();
        whole["new"] = json!({"a": [1]});
        whole["initiator_actor_email"] = json!("a@example.net");
        whole["initiator_device_serial"] = json!(null);
        whole["initiator_device_uuid"] = json!(7);
        let token = token_of(&whole);
        let read = parse(token.clone()).unwrap();
        assert_eq!(read.token, token);
        assert_eq!(read.claims.policy_authorization_id.to_string(), "0d1c7a55-9b7e-4f6c-8a3e-5f1b2c3d4e5f");
        assert_eq!(
            (read.claims.iat, read.claims.exp),
            (UnixSeconds(1_760_000_000), UnixSeconds(1_770_000_000))
        );
        assert!(read.claims.uploads_enabled);
        assert_eq!(read.claims.resource_name, "the resource_name");
        let optional = OptionalClaims {
            initiator_actor_email: Some("a@example.net".into()),
            ..OptionalClaims::default()
        };
        assert_eq!(read.claims.optional, optional);
    }

    #[test]
    fn a_required_claim_must_be_there_and_of_its_type() {
        for name in REQUIRED {
            let (mut without, mut wrong) = (claims(), claims());
            without.as_object_mut().unwrap().remove(name);
            wrong[name] = json!([]);
            for claims in [without, wrong] {
                assert_eq!(parse(token_of(&claims)), Err(TokenError::Claim(name)));
            }
        }
        for (time, expect) in [(json!(-1), None), (json!(1.9), Some(1)), (json!("1"), None)] {
            let mut odd = claims();
            odd["exp"] = time;
            let got = parse(token_of(&odd)).map(|a| a.claims.exp.0);
            assert_eq!(got, expect.ok_or(TokenError::Claim("exp")));
        }
    }

    #[test]
    fn hostile_roles_and_ids_are_refused() {
        for role in ["initiator", "", "Responder", "responder ", "../responder", "responder\0"] {
            let mut hostile = claims();
            hostile["role"] = json!(role);
            assert_eq!(parse(token_of(&hostile)), Err(TokenError::Role), "{role:?}");
        }
        let id = claims()["policy_authorization_id"].as_str().unwrap().to_owned();
        for hostile_id in [
            String::new(),
            "../..".into(),
            format!("../{id}"),
            id.to_uppercase(),
            id.replace('-', ""),
            format!("{{{id}}}"),
            format!("urn:uuid:{id}"),
            id[..35].into(),
            format!("{id}\0"),
            format!("{} ", &id[..35]),
            "../../../../../../../../etc/passwd//".into(),
        ] {
            let mut hostile = claims();
            hostile["policy_authorization_id"] = json!(hostile_id);
            assert_eq!(parse(token_of(&hostile)), Err(TokenError::AuthorizationId), "{hostile_id:?}");
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let whole = token_of(&claims()).0;
        let payload = whole.split('.').nth(1).unwrap();
        let encoded = |json: &[u8]| format!("h.{}.s", URL_SAFE_NO_PAD.encode(json));
        for text in [
            "".into(),
            "..".into(),
            "a.b".into(),
            format!("h.{payload}"),
            format!("h.{payload}.s.x"),
            format!("h.{payload}=.s"),
            format!("h.{}.s", &payload[1..]),
            "h.????.s".into(),
            encoded(b"[]"),
            encoded(b"7"),
            encoded(b"{"),
            encoded(b"\xff"),
            encoded("[".repeat(10_000).as_bytes()),
        ] {
            assert_eq!(parse(secret(&text)), Err(TokenError::Malformed), "{text:?}");
        }
    }

    #[test]
    fn a_token_has_a_longest_length() {
        let mut long = claims();
        let room = MAX_TOKEN - token_of(&long).0.len();
        // Three bytes become four characters.
        long["resource_name"] = json!("n".repeat(room / 4 * 3));
        assert!(parse(token_of(&long)).is_ok());
        long["resource_name"] = json!("n".repeat(room / 4 * 3 + 64));
        assert_eq!(parse(token_of(&long)), Err(TokenError::TooLong));
    }

    /// The claims of a token as a portal makes it.
    pub(crate) fn claims() -> Value {
        let mut claims: Map<String, Value> =
            REQUIRED.iter().map(|name| ((*name).to_owned(), json!(format!("the {name}")))).collect();
        claims.insert("iat".into(), json!(1_760_000_000));
        claims.insert("exp".into(), json!(1_770_000_000));
        claims.insert("uploads_enabled".into(), json!(true));
        claims.insert("role".into(), json!("responder"));
        claims.insert("policy_authorization_id".into(), json!("0d1c7a55-9b7e-4f6c-8a3e-5f1b2c3d4e5f"));
        Value::Object(claims)
    }

    /// A token that says so.
    pub(crate) fn token_of(claims: &Value) -> Secret {
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        secret(&format!("{}.{}.c2lnbmF0dXJl", encode(&json!({"alg": "HS256"})), encode(claims)))
    }

    fn secret(text: &str) -> Secret {
        Secret(Zeroizing::new(text.to_owned()))
    }
}

//! Values a portal derives from ids, keys and secrets (portal-protocol.md section 11).
//!
//! Pure functions, checked against test-vectors.md sections 1 to 4.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// A user name and a password: of ICE (ufrag, password) or of TURN.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Public half.
    pub username: String,
    /// Secret half.
    pub password: String,
}

impl Credentials {
    /// As it stands in a message.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({ "username": self.username, "password": self.password })
    }
}

/// One end of a client-gateway pair, as the derivations see it.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// Its id at the portal.
    pub id: Uuid,
    /// Its WireGuard public key: 44 characters of base64, as reported.
    pub public_key: &'a str,
    /// Its share of the preshared key.
    pub secret: &'a [u8; 32],
}

/// Section 11.2: the ICE credentials of (client, gateway). They change only when an id or a key does.
#[must_use]
pub fn ice_credentials(client: End<'_>, gateway: End<'_>) -> (Credentials, Credentials) {
    let input = format!("{}:{}:{}:{}", client.id, client.public_key, gateway.id, gateway.public_key);
    let text = base32_lower(&Sha256::digest(input));
    let cut = |ufrag: std::ops::Range<usize>, password: std::ops::Range<usize>| Credentials {
        username: text[ufrag].to_owned(),
        password: text[password].to_owned(),
    };
    (cut(0..4, 4..26), cut(26..30, 30..52))
}

/// Section 11.3: PBKDF2-HMAC-SHA256 with one iteration and 32 bytes of output, so it is one HMAC.
#[must_use]
pub fn preshared_key(client: End<'_>, gateway: End<'_>) -> String {
    let mut password = [0; 64];
    password[..32].copy_from_slice(client.secret);
    password[32..].copy_from_slice(gateway.secret);
    let salt = format!(
        "WG_PSK|C_ID:{}|G_ID:{}|C_PK:{}|G_PK:{}",
        client.id, gateway.id, client.public_key, gateway.public_key
    );
    // RFC 8018 section 5.2: U_1 = PRF(P, S || INT(i)), and with c = 1 the first block is U_1.
    STANDARD.encode(hmac_sha256(&password, &[salt.as_bytes(), &1_u32.to_be_bytes()]))
}

/// Section 11.4: relay credentials as upstream's relay checks them, from the relay's stamp secret.
#[must_use]
pub fn stamp_credentials(public_key: &str, expires_at: u64, stamp_secret: &str) -> Credentials {
    let salt = STANDARD_NO_PAD.encode(Sha256::digest(public_key));
    let password = STANDARD_NO_PAD.encode(Sha256::digest(format!("{expires_at}:{stamp_secret}:{salt}")));
    Credentials { username: format!("{expires_at}:{salt}"), password }
}

/// The same for coturn's `use-auth-secret`: `password = base64(HMAC-SHA1(secret, username))`.
#[must_use]
pub fn rest_credentials(public_key: &str, expires_at: u64, shared_secret: &str) -> Credentials {
    let salt = STANDARD_NO_PAD.encode(Sha256::digest(public_key));
    let username = format!("{expires_at}:{salt}");
    let mut mac =
        Hmac::<sha1::Sha1>::new_from_slice(shared_secret.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(username.as_bytes());
    Credentials { password: STANDARD.encode(mac.finalize().into_bytes()), username }
}

/// Section 11.4: a relay's id, shaped like a UUIDv4, from its stamp secret.
#[must_use]
pub fn relay_id(stamp_secret: &str) -> Uuid {
    uuid_from(stamp_secret)
}

/// A stable id for anything that has a name: the same shape as [`relay_id`].
#[must_use]
pub fn uuid_from(text: &str) -> Uuid {
    let digest = Sha256::digest(text);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// cli-and-service.md section 5: an id that is a UUID is sent as the hex SHA-256 of its text.
#[must_use]
pub fn external_id(configured: &str) -> String {
    match Uuid::parse_str(configured) {
        Ok(_) => hex::encode(Sha256::digest(configured)),
        Err(_) => configured.to_owned(),
    }
}

/// A JWT signed with HS256 (section 11.5).
#[must_use]
pub fn jwt(claims: &Value, key: &[u8]) -> String {
    let header = URL_SAFE_NO_PAD.encode(json!({ "alg": "HS256", "typ": "JWT" }).to_string());
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let signature = URL_SAFE_NO_PAD.encode(hmac_sha256(key, &[signed.as_bytes()]));
    format!("{signed}.{signature}")
}

/// The claims of a JWT, if `key` has signed it by HS256.
pub fn verified_claims(token: &str, key: &[u8]) -> Option<Value> {
    let (signed, signature) = token.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let json = |part: &str| serde_json::from_slice::<Value>(&URL_SAFE_NO_PAD.decode(part).ok()?).ok();
    let right = json(header)?["alg"] == "HS256"
        && URL_SAFE_NO_PAD.decode(signature).ok()? == hmac_sha256(key, &[signed.as_bytes()]);
    json(claims).filter(|_| right)
}

fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// RFC 4648 section 6, lower case, unpadded.
fn base32_lower(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
    let (mut bits, mut count) = (0_u32, 0);
    for byte in bytes {
        bits = (bits << 8 | u32::from(*byte)) & 0xFFF;
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(char::from(ALPHABET[(bits >> count & 31) as usize]));
        }
    }
    if count > 0 {
        text.push(char::from(ALPHABET[(bits << (5 - count) & 31) as usize]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT_KEY: &str = "MBjm42jMxgG4UeZ9HiTvaeermTeFEsludndtMLyCLxo=";
    const GATEWAY_KEY: &str = "fHncahE8G9aCtMyaaswAq/SRbENRWUU3Q3DkGQA3JFk=";

    fn with_ends<T>(check: impl Fn(End<'_>, End<'_>) -> T) -> T {
        let client_secret = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let gateway_secret = std::array::from_fn(|i| u8::try_from(i + 32).unwrap());
        let client = End {
            id: Uuid::parse_str("e5e13bc7-7e37-575b-8bb8-a3606add7b35").unwrap(),
            public_key: CLIENT_KEY,
            secret: &client_secret,
        };
        let gateway = End {
            id: Uuid::parse_str("e4d6f4c0-b3b8-5d38-838e-737a3028f346").unwrap(),
            public_key: GATEWAY_KEY,
            secret: &gateway_secret,
        };
        check(client, gateway)
    }

    #[test]
    fn ice_credentials_match_vector_2() {
        let (client, gateway) = with_ends(ice_credentials);
        assert_eq!((&*client.username, &*client.password), ("o7vl", "5dm2b4nl6bk6m77jluz5md"));
        assert_eq!((&*gateway.username, &*gateway.password), ("7swh", "v4gth7yrtmrzjum2tyhguq"));
    }

    #[test]
    fn preshared_key_matches_vector_3() {
        assert_eq!(with_ends(preshared_key), "a0bTekSBwd1/eopqFBvDTLN3KrwsKiCkvlix5AEH4/I=");
    }

    #[test]
    fn relay_credentials_and_id_match_vector_4() {
        let secret = "0".repeat(64);
        let credentials = stamp_credentials(GATEWAY_KEY, 2_145_916_800, &secret);
        assert_eq!(credentials.username, "2145916800:QiROe5zpklma29jrJ0UbH/Waw1A2hHE+E8TxcaUVhTs");
        assert_eq!(credentials.password, "1uABq/r5yKPGSn8qCNasJlkrsKR00o07wMkYnSRojS8");
        assert_eq!(relay_id(&secret).to_string(), "60e05bd1-b195-4f2f-9411-2fa7197a5c88");
    }

    #[test]
    fn rest_credentials_match_an_hmac_made_by_openssl() {
        // printf '2145916800:QiROe5zpklma29jrJ0UbH/Waw1A2hHE+E8TxcaUVhTs' | openssl dgst -sha1 -hmac north -binary | base64
        let credentials = rest_credentials(GATEWAY_KEY, 2_145_916_800, "north");
        assert_eq!(credentials.username, "2145916800:QiROe5zpklma29jrJ0UbH/Waw1A2hHE+E8TxcaUVhTs");
        assert_eq!(credentials.password, "a+auhULvjPlL+QBk7jgbNTNAdPs=");
    }

    #[test]
    fn external_ids_match_vector_1() {
        let table = [
            (
                "11111111-1111-4111-8111-111111111111",
                "bd7662a5eeb41614e720d477abfcb2272e19a8a70a93b7e3bc8560d44ad326e9",
            ),
            (
                "0123456789abcdef0123456789abcdef",
                "3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9",
            ),
            ("gw-fra-1", "gw-fra-1"),
        ];
        for (configured, sent) in table {
            assert_eq!(external_id(configured), sent);
        }
    }

    #[test]
    fn jwt_has_three_segments_and_the_declared_algorithm() {
        let token = jwt(&json!({ "role": "responder" }), b"key");
        let parts: Vec<_> = token.split('.').collect();
        assert_eq!(parts.len(), 3);
        let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[0]).unwrap()).unwrap();
        assert_eq!(header["alg"], "HS256");
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
        assert_eq!(claims["role"], "responder");
        assert_eq!(verified_claims(&token, b"key"), Some(claims));
        assert_eq!(verified_claims(&token, b"another key"), None);
        assert_eq!(verified_claims(&format!("{}.{}.AAAA", parts[0], parts[1]), b"key"), None);
    }
}

//! Where to connect: the portal's URL, our identity in its query (portal-protocol.md section 1).

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};
use url::{Host, Url, form_urlencoded};
use uuid::Uuid;

use super::endpoint::Generation;

/// A portal and who we are to it; the same for every attempt of a process.
#[derive(Debug, Clone)]
pub struct LoginUrl {
    base: Url,
    external_id: String,
    name: String,
    public_key: String,
}

/// Why `--api-url` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a URL.
    #[error("--api-url (FIREZONE_API_URL) is not an absolute URL: {0}")]
    Syntax(#[from] url::ParseError),
    /// Not http, https, ws or wss.
    #[error("--api-url (FIREZONE_API_URL) has the scheme `{0}`; use wss, ws, https or http")]
    Scheme(String),
    /// No host.
    #[error("--api-url (FIREZONE_API_URL) names no host")]
    NoHost,
}

impl LoginUrl {
    /// `id` is the configured gateway ID (not yet hashed), `public_key` our WireGuard key.
    ///
    /// # Errors
    /// The URL has another scheme, or no host.
    pub fn new(api_url: &str, id: &str, name: &str, public_key: &[u8; 32]) -> Result<Self, UrlError> {
        let url = Url::parse(api_url)?;
        let scheme = match url.scheme() {
            "http" | "ws" => "ws",
            "https" | "wss" => "wss",
            other => return Err(UrlError::Scheme(other.to_owned())),
        };
        // Rebuilt from its parts: user, password, query and fragment must not travel or be logged.
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or(UrlError::NoHost)?;
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        let base = Url::parse(&format!("{scheme}://{host}{port}{}", url.path()))?;
        Ok(Self {
            base,
            external_id: external_id(id),
            name: name.to_owned(),
            public_key: STANDARD.encode(public_key),
        })
    }

    /// Is it `wss`?
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.base.scheme() == "wss"
    }

    /// The host to resolve, or the address to dial; IPv6 without brackets.
    #[must_use]
    pub fn host(&self) -> String {
        match self.base.host() {
            Some(Host::Domain(name)) => name.to_owned(),
            Some(Host::Ipv4(ip)) => ip.to_string(),
            Some(Host::Ipv6(ip)) => ip.to_string(),
            None => unreachable!("`new` refuses a URL without host"),
        }
    }

    /// The port to dial: the explicit one, else 443 for `wss` and 80 for `ws` (upstream dials 443 in both cases:
    /// section 14 item 1).
    #[must_use]
    pub fn port(&self) -> u16 {
        self.base.port().unwrap_or(if self.is_tls() { 443 } else { 80 })
    }

    /// The `Host` header: with the port unless it is the scheme's own (RFC 9110 section 7.2).
    #[must_use]
    pub fn host_header(&self) -> String {
        let host = self.base.host_str().unwrap_or_default();
        match self.base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// Path and query of the upgrade request. `query_token` goes in front, for Nov-2025 portals, which know no other
    /// place; with it the result is a secret.
    #[must_use]
    pub fn request_target(&self, generation: Generation, query_token: Option<&str>) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if let Some(token) = query_token {
            query.append_pair("token", token);
        }
        query.append_pair("external_id", &self.external_id);
        query.append_pair("name", &self.name);
        query.append_pair("public_key", &self.public_key);
        format!("{}?{}", self.path(generation), query.finish())
    }

    /// The URL without its query, for logs.
    #[must_use]
    pub fn display(&self, generation: Generation) -> String {
        format!("{}://{}{}", self.base.scheme(), self.host_header(), self.path(generation))
    }

    fn path(&self, generation: Generation) -> String {
        let path = self.base.path();
        let path = path.strip_suffix('/').unwrap_or(path);
        match generation {
            Generation::V1 => format!("{path}/gateway/websocket"),
            Generation::V2 => format!("{path}/gateway/v2/websocket"),
        }
    }
}

/// What the portal knows this gateway by: hex SHA-256 of the configured ID if that is a UUID in any textual form, else
/// the ID itself (cli-and-service.md section 5). The hash is over the text as configured.
#[must_use]
pub fn external_id(id: &str) -> String {
    match Uuid::try_parse(id) {
        Ok(_) => hex::encode(Sha256::digest(id)),
        Err(_) => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_id_matches_the_test_vectors() {
        for (id, expect) in [
            (
                "11111111-1111-4111-8111-111111111111",
                "bd7662a5eeb41614e720d477abfcb2272e19a8a70a93b7e3bc8560d44ad326e9",
            ),
            (
                "22222222-2222-4222-8222-222222222222",
                "b454f82c5857ebabf342b7258e5cf7def78b7cd975814119462973de9a38df10",
            ),
            (
                "0123456789abcdef0123456789abcdef",
                "3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9",
            ),
            (
                "4f8524fd33934a31a180a598f9457d80",
                "05c3f2f2c55836a4376ca0c0154d5d2d4898644c2366c64c2cc13ca6302dc701",
            ),
            (
                "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336",
                "eeefe5d1cb3807dfc3ae24794878ec3147027390d839d1d718d8e42bcfde3336",
            ),
            ("gw-fra-1", "gw-fra-1"),
        ] {
            assert_eq!(external_id(id), expect, "{id}");
        }
        let hashed = |id: &str| external_id(id) == hex::encode(Sha256::digest(id));
        assert!(hashed("urn:uuid:11111111-1111-4111-8111-111111111111"));
        assert!(hashed("{11111111-1111-4111-8111-111111111111}"));
        assert_ne!(
            external_id("AAAAAAAA-1111-4111-8111-111111111111"),
            external_id("aaaaaaaa-1111-4111-8111-111111111111"),
            "no normalization"
        );
    }

    #[test]
    fn host_port_and_path_follow_the_url() {
        for (url, tls, host, port, header, path) in [
            (
                "wss://api.example.net",
                true,
                "api.example.net",
                443,
                "api.example.net",
                "/gateway/v2/websocket",
            ),
            (
                "https://api.example.net/",
                true,
                "api.example.net",
                443,
                "api.example.net",
                "/gateway/v2/websocket",
            ),
            (
                "ws://api.example.net",
                false,
                "api.example.net",
                80,
                "api.example.net",
                "/gateway/v2/websocket",
            ),
            ("http://h:80", false, "h", 80, "h", "/gateway/v2/websocket"),
            ("ws://h:443", false, "h", 443, "h:443", "/gateway/v2/websocket"),
            ("ws://h:8081/", false, "h", 8081, "h:8081", "/gateway/v2/websocket"),
            ("wss://h:443", true, "h", 443, "h", "/gateway/v2/websocket"),
            ("wss://h:13000/base/", true, "h", 13000, "h:13000", "/base/gateway/v2/websocket"),
            ("wss://h/a/b?x=1#y", true, "h", 443, "h", "/a/b/gateway/v2/websocket"),
            ("wss://user:pw@h/", true, "h", 443, "h", "/gateway/v2/websocket"),
            ("ws://192.0.2.1:81", false, "192.0.2.1", 81, "192.0.2.1:81", "/gateway/v2/websocket"),
            ("ws://[2001:db8::1]:81", false, "2001:db8::1", 81, "[2001:db8::1]:81", "/gateway/v2/websocket"),
            ("wss://[2001:db8::1]", true, "2001:db8::1", 443, "[2001:db8::1]", "/gateway/v2/websocket"),
        ] {
            let login = LoginUrl::new(url, "id", "n", &[0; 32]).unwrap();
            assert_eq!(
                (login.is_tls(), login.host().as_str(), login.port(), login.host_header().as_str()),
                (tls, host, port, header),
                "{url}"
            );
            assert!(login.request_target(Generation::V2, None).starts_with(&format!("{path}?")), "{url}");
            assert!(!format!("{login:?}{}", login.display(Generation::V2)).contains("pw"), "{url}");
        }
    }

    #[test]
    fn the_query_is_ordered_and_form_encoded() {
        let mut key = [0; 32];
        key[..3].copy_from_slice(&[0xfb, 0xef, 0xff]); // "++//"
        let login = LoginUrl::new("wss://h", "gw-1", "Büro Süd+1/2=x", &key).unwrap();
        let key = "%2B%2B%2F%2FAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA%3D";
        let rest = format!("external_id=gw-1&name=B%C3%BCro+S%C3%BCd%2B1%2F2%3Dx&public_key={key}");
        assert_eq!(login.request_target(Generation::V2, None), format!("/gateway/v2/websocket?{rest}"));
        assert_eq!(
            login.request_target(Generation::V1, Some(".SFM a+b")),
            format!("/gateway/websocket?token=.SFM+a%2Bb&{rest}")
        );
        assert_eq!(login.display(Generation::V1), "wss://h/gateway/websocket");
    }

    #[test]
    fn an_unusable_url_is_refused_by_name() {
        for url in ["ftp://h", "file:///x", "api.example.net", "", "wss://", "unix:/run/x"] {
            let error = LoginUrl::new(url, "id", "n", &[0; 32]).unwrap_err().to_string();
            assert!(error.starts_with("--api-url"), "{url}: {error}");
        }
    }
}

//! Who may open a WebSocket, and what the others are told (portal-protocol.md sections 1, 3, 4).

use base64::Engine as _;
use serde_json::{Map, Value, json};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request};
use tokio_tungstenite::tungstenite::http::{Response, StatusCode};

use super::config::Generation;
use super::log::{Direction, Role};
use super::state::State;

/// What a device said about itself when it connected.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) role: Role,
    /// The v2 endpoint, so the Aug-2026 event names.
    pub(super) v2: bool,
    pub(super) external_id: String,
    pub(super) name: String,
    pub(super) public_key: String,
    pub(super) user_agent: String,
    /// The token came in `X-Authorization`, not in the query.
    pub(super) header_token: bool,
    pub(super) path: String,
    /// All query parameters but the token.
    pub(super) query: Map<String, Value>,
}

/// An HTTP error instead of the upgrade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// `code` of the problem body; `None` sends plain text instead.
    pub code: Option<String>,
    /// Value of the `Retry-After` header.
    pub retry_after: Option<String>,
}

impl Refusal {
    /// A refusal with a problem body and without `Retry-After`.
    #[must_use]
    pub fn new(status: u16, code: &str) -> Self {
        Self { status, code: Some(code.into()), retry_after: None }
    }

    /// 503 `rate_limit` with `Retry-After: seconds`.
    #[must_use]
    pub fn busy(seconds: u64) -> Self {
        Self { retry_after: Some(seconds.to_string()), ..Self::new(503, "rate_limit") }
    }

    fn body(&self) -> String {
        match &self.code {
            Some(code) => {
                json!({ "type": "about:blank", "title": code, "status": self.status, "detail": code, "code": code })
                    .to_string()
            }
            None => "Forbidden".into(),
        }
    }

    /// The response bytes' source.
    pub(super) fn response(&self) -> ErrorResponse {
        let body = self.body();
        let kind = if self.code.is_some() { "application/problem+json; charset=utf-8" } else { "text/plain" };
        let mut response = Response::builder()
            .status(StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
            .header("Content-Type", kind)
            .header("Content-Length", body.len())
            .header("Connection", "close");
        if let Some(retry_after) = &self.retry_after {
            response = response.header("Retry-After", retry_after);
        }
        response.body(Some(body)).unwrap_or_else(|_| ErrorResponse::new(None))
    }
}

/// All checks of section 4, in its order; a passed one is a device that may be registered.
pub(super) fn admit(state: &mut State, request: &Request) -> Result<Login, Refusal> {
    let path = request.uri().path().to_owned();
    let login = check(state, request);
    if let Err(refusal) = &login {
        let role = if path.contains("client") { Role::Client } else { Role::Gateway };
        let msg = json!({ "path": path, "status": refusal.status, "code": refusal.code });
        state.record(role, None, Direction::Refused, msg);
    }
    login
}

fn check(state: &mut State, request: &Request) -> Result<Login, Refusal> {
    let path = request.uri().path();
    let (role, v2) = endpoint(path, state.config.generation)?;
    if let Some(nth) = state.refusals.iter().position(|(r, _)| *r == role)
        && let Some((_, refusal)) = state.refusals.remove(nth)
    {
        return Err(refusal);
    }
    let mut query: Map<String, Value> =
        url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
            .map(|(k, v)| (k.into_owned(), Value::String(v.into_owned())))
            .collect();
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let from_query = query.remove("token").and_then(|t| t.as_str().map(str::to_owned));
    let from_header = header("X-Authorization").strip_prefix("Bearer ").map(str::to_owned);
    let header_token = from_header.is_some();
    let token = from_header.or(from_query).ok_or_else(|| Refusal::new(401, "missing_token"))?;
    let expected = match role {
        Role::Gateway => &state.config.gateway_token,
        Role::Client => &state.config.client_token,
    };
    if token != *expected {
        return Err(Refusal::new(401, "invalid_token"));
    }
    let text = |name: &str| query.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let public_key = text("public_key");
    let decoded = base64::engine::general_purpose::STANDARD.decode(&public_key);
    let external_id = Some(text("external_id")).filter(|id| !id.is_empty());
    let (Some(external_id), true, Ok(_)) = (external_id, public_key.len() == 44, decoded) else {
        return Err(Refusal::new(400, "invalid_connect_params"));
    };
    // First wins at HEAD; Nov-2025 allowed a second connection (section 12).
    if role == Role::Gateway && v2 && state.is_connected(role, &external_id) {
        return Err(Refusal::new(409, "gateway_already_connected"));
    }
    Ok(Login {
        role,
        v2,
        external_id,
        name: text("name"),
        public_key,
        user_agent: header("User-Agent").to_owned(),
        header_token,
        path: path.to_owned(),
        query,
    })
}

fn endpoint(path: &str, generation: Generation) -> Result<(Role, bool), Refusal> {
    let endpoint = match path {
        "/gateway/v2/websocket" => (Role::Gateway, true),
        "/gateway/websocket" => (Role::Gateway, false),
        "/client/v2/websocket" => (Role::Client, true),
        "/client/websocket" => (Role::Client, false),
        _ => return Err(Refusal { status: 404, code: None, retry_after: None }),
    };
    match (generation, endpoint.1) {
        (Generation::V1Only, true) => Err(Refusal { status: 404, code: None, retry_after: None }),
        _ => Ok(endpoint),
    }
}

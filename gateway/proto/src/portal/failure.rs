//! What can go wrong with the portal, as sentences without secrets, and which of it is fatal
//! (portal-protocol.md sections 4 to 6). How long to wait is [`super::retry`]'s business.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use serde::Deserialize;

/// Why an attempt to connect, or a connection, ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The host name gave no address.
    #[error("cannot resolve the portal's host: {0}")]
    Resolve(String),
    /// No address accepted a TCP connection.
    #[error("cannot reach the portal: {0}")]
    Connect(String),
    /// `SO_MARK` was refused: without the mark the kernel could route the portal's traffic into our own tunnel.
    #[error("cannot set the firewall mark (SO_MARK) on the portal socket: {0}")]
    Mark(String),
    /// The server's certificate is not trusted.
    #[error(
        "the portal's certificate is not trusted: {0}; for a portal with a private CA name the CA's PEM file with \
         --ca-file or SSL_CERT_FILE"
    )]
    Certificate(String),
    /// TLS failed otherwise.
    #[error("TLS with the portal failed: {0}")]
    Tls(String),
    /// A phase took too long.
    #[error("{what} took longer than {} s", limit.as_secs())]
    TimedOut {
        /// Which phase.
        what: &'static str,
        /// Its limit.
        limit: Duration,
    },
    /// The server did not upgrade to a WebSocket.
    #[error("the portal refused the connection: {0}")]
    Refused(Refusal),
    /// The upgrade answer was not HTTP or not a valid upgrade.
    #[error("the portal's answer to the WebSocket upgrade is invalid: {0}")]
    Upgrade(String),
    /// No acknowledgement of the join within 5 s.
    #[error("the portal did not acknowledge the join")]
    JoinTimeout,
    /// The portal refused the join.
    #[error("the portal refused the join: {0}")]
    JoinRefused(String),
    /// `disconnect` with reason `token_expired`.
    #[error(
        "the portal disconnected this gateway: its token was deleted, or another gateway with the same ID is connected"
    )]
    TokenExpired,
    /// `phx_close` on our topic.
    #[error("the portal closed the channel")]
    ChannelClosed,
    /// The channel was lost and re-joined over and over on one socket.
    #[error("the portal keeps losing the channel")]
    ChannelUnstable,
    /// Too many heartbeats without reply.
    #[error("the portal stopped answering heartbeats")]
    HeartbeatsLost,
    /// A portal without `no_relays` tells relays after a join only.
    #[error("no relay is left, and this portal names relays to gateways that join only")]
    NoRelays,
    /// The peer closed the WebSocket or the stream ended.
    #[error("the portal closed the connection{0}")]
    Closed(String),
    /// The stream failed.
    #[error("the connection to the portal broke: {0}")]
    Broken(String),
}

impl Failure {
    /// Does the process end over this? The one list of fatal portal failures besides an exhausted budget
    /// ([`super::retry::Verdict::GiveUp`]).
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Refused(refusal) => refusal.status == 401,
            // A server-side crash while joining passes (section 14 item 3); a refusal does not.
            Self::JoinRefused(reason) => reason != "join crashed",
            Self::TokenExpired | Self::Mark(_) => true,
            Self::Resolve(_)
            | Self::Connect(_)
            | Self::Certificate(_)
            | Self::Tls(_)
            | Self::TimedOut { .. }
            | Self::Upgrade(_)
            | Self::JoinTimeout
            | Self::ChannelClosed
            | Self::ChannelUnstable
            | Self::HeartbeatsLost
            | Self::NoRelays
            | Self::Closed(_)
            | Self::Broken(_) => false,
        }
    }

    /// The delay the server asked for, capped; never with a 401.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) if refusal.status != 401 => refusal.retry_after,
            _ => None,
        }
    }

    /// The portal still holds an earlier connection of this gateway: it notices a dead one after 37 s.
    #[must_use]
    pub fn is_already_connected(&self) -> bool {
        let Self::Refused(refusal) = self else { return false };
        refusal.problem.as_ref().is_some_and(|problem| problem.code == "gateway_already_connected")
    }
}

/// A longer `Retry-After` is a mistake: unbounded, one bogus value parks the gateway (section 14 item 4).
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// An HTTP answer other than 101.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status code.
    pub status: u16,
    /// The problem document, if there was one.
    pub problem: Option<Problem>,
    /// `Retry-After`, at most [`MAX_RETRY_AFTER`].
    pub retry_after: Option<Duration>,
    /// The beginning of any other body, on one line.
    text: String,
}

/// `application/problem+json` (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// Which problem.
    #[serde(default)]
    pub code: String,
    /// Its name.
    #[serde(default)]
    pub title: String,
    /// What happened.
    #[serde(default)]
    pub detail: String,
}

impl Refusal {
    /// `unix_now` is the time since 1970, for a `Retry-After` that is a date. The body must be free of our own secrets
    /// (an error page may echo the request).
    #[must_use]
    pub fn new(
        status: u16,
        content_type: Option<&str>,
        retry_after: Option<&str>,
        body: &[u8],
        unix_now: Duration,
    ) -> Self {
        // Section 4: only recognized if the type up to `;` equals the problem type, in any case.
        let is_problem = content_type
            .and_then(|value| value.split(';').next())
            .is_some_and(|value| value.trim().eq_ignore_ascii_case("application/problem+json"));
        let problem = if is_problem { serde_json::from_slice::<Problem>(body).ok() } else { None };
        let problem = problem.map(|problem| Problem {
            code: one_line(&problem.code),
            title: one_line(&problem.title),
            detail: one_line(&problem.detail),
        });
        let text = if problem.is_none() { one_line(&String::from_utf8_lossy(body)) } else { String::new() };
        Self { status, problem, retry_after: retry_after.and_then(|v| parse_retry_after(v, unix_now)), text }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        match &self.problem {
            Some(Problem { code, title, detail }) => {
                let sentence = if detail.is_empty() { title } else { detail };
                if !sentence.is_empty() {
                    write!(f, " {sentence}")?;
                }
                if !code.is_empty() {
                    write!(f, " ({code})")?;
                }
                Ok(())
            }
            None if self.text.is_empty() => Ok(()),
            None => write!(f, " {}", self.text),
        }
    }
}

/// RFC 9110 section 10.2.3: seconds, or a date (a past one is zero). Anything else is no delay at all. At most
/// [`MAX_RETRY_AFTER`]. `unix_now` is the time since 1970.
#[must_use]
pub fn parse_retry_after(value: &str, unix_now: Duration) -> Option<Duration> {
    let value = value.trim();
    let wanted = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // Too many digits for u64 is too long in any case.
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        let date = httpdate::parse_http_date(value).ok()?;
        let date = date.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        date.saturating_sub(unix_now)
    };
    Some(wanted.min(MAX_RETRY_AFTER))
}

/// At most 200 characters of `text` without control characters, so that a server cannot forge log lines.
fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBLEM: &[u8] = br#"{"type":"about:blank","title":"Conflict","status":409,"detail":"A gateway with this ID is already connected","code":"gateway_already_connected"}"#;

    #[test]
    fn a_problem_body_is_read_only_under_its_content_type() {
        for (content_type, recognized) in [
            (Some("application/problem+json"), true),
            (Some("Application/Problem+JSON; charset=utf-8"), true),
            (Some("application/json"), false),
            (None, false),
        ] {
            let refusal = Refusal::new(409, content_type, None, PROBLEM, Duration::ZERO);
            assert_eq!(refusal.problem.is_some(), recognized, "{content_type:?}");
        }
        let refusal = Refusal::new(409, Some("application/problem+json"), None, PROBLEM, Duration::ZERO);
        assert_eq!(
            refusal.to_string(),
            "HTTP 409 A gateway with this ID is already connected (gateway_already_connected)"
        );
        assert!(Failure::Refused(refusal).is_already_connected());
    }

    #[test]
    fn another_body_becomes_one_short_line() {
        let body = format!("<html>\r\n\x1b[31mforged\nERROR line{}", "x".repeat(500));
        let shown = Refusal::new(502, Some("text/html"), None, body.as_bytes(), Duration::ZERO).to_string();
        assert!(shown.starts_with("HTTP 502 <html> [31mforged ERROR line"), "{shown}");
        assert!(shown.ends_with("x..."), "{shown}");
        assert!(shown.chars().all(|c| !c.is_control()) && shown.len() < 230, "{shown}");
        assert_eq!(Refusal::new(500, None, None, b"\xff\xfe", Duration::ZERO).status, 500);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_capped() {
        // Sun, 06 Nov 1994 08:49:37 GMT is 784111777.
        let now = Duration::from_secs(784_111_777);
        for (value, expect) in [
            ("0", Some(0)),
            ("1", Some(1)),
            (" 7 ", Some(7)),
            ("86400", Some(300)),
            ("99999999999999999999999", Some(300)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("Sat, 06 Nov 2094 08:49:00 GMT", Some(300)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(parse_retry_after(value, now), expect.map(Duration::from_secs), "{value:?}");
        }
        let refused = |status| Failure::Refused(Refusal::new(status, None, Some("3"), b"", now));
        assert_eq!(refused(503).retry_after(), Some(Duration::from_secs(3)));
        assert_eq!(refused(401).retry_after(), None, "a 401 is fatal");
    }

    #[test]
    fn only_the_listed_failures_are_fatal() {
        let refused = |status| Failure::Refused(Refusal::new(status, None, None, b"", Duration::ZERO));
        for (failure, fatal) in [
            (refused(401), true),
            (refused(400), false),
            (refused(403), false),
            (refused(409), false),
            (refused(500), false),
            (Failure::JoinRefused("unauthorized".into()), true),
            (Failure::JoinRefused("join crashed".into()), false),
            (Failure::TokenExpired, true),
            (Failure::Mark("EPERM".into()), true),
            (Failure::Certificate("UnknownIssuer".into()), false),
            (Failure::JoinTimeout, false),
            (Failure::NoRelays, false),
            (Failure::ChannelClosed, false),
        ] {
            assert_eq!(failure.is_fatal(), fatal, "{failure}");
        }
    }
}

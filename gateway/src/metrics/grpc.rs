//! One unary call over gRPC (gRPC over HTTP/2, "Protocol"): without TLS, as upstream's (cli-and-service.md section 15.2).

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http2, header::HeaderMap};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, time::timeout};

/// For all of it: resolving, connecting, the call.
const LIMIT: Duration = Duration::from_secs(10);
/// What an answer may be long, in bytes. A collector's is empty but for what it has to say about refused points.
const ANSWER: usize = 64 << 10;

/// Calls `path` at `endpoint` (host:port) with one message and returns the one that is answered.
///
/// # Errors
/// In one sentence: not reached, no answer in 10 s, an answer that is not gRPC, or a status other than OK.
pub async fn call(endpoint: &str, path: &str, message: &[u8]) -> Result<Bytes> {
    let answer = timeout(LIMIT, attempt(endpoint, path, message)).await;
    answer.unwrap_or_else(|_| bail!("no answer within {} s", LIMIT.as_secs()))
}

async fn attempt(endpoint: &str, path: &str, message: &[u8]) -> Result<Bytes> {
    let stream = TcpStream::connect(endpoint).await.context("it cannot be reached")?;
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.context("it speaks no HTTP/2")?;
    // It ends when `sender` is dropped.
    let connection = tokio::spawn(connection);
    let request = Request::post(format!("http://{endpoint}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", concat!("firezone-gateway/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(frame(message)?))?;
    let answer = sender.send_request(request).await.context("the call failed");
    let answer = match answer {
        Ok(answer) => answer,
        Err(e) => {
            connection.abort();
            return Err(e);
        }
    };
    let (head, body) = answer.into_parts();
    ensure!(head.status == StatusCode::OK, "it answered with HTTP status {}", head.status.as_u16());
    // A refusal may come without a body; its status stands in the headers then.
    check(&head.headers)?;
    let body = Limited::new(body, ANSWER)
        .collect()
        .await
        .map_err(|e| anyhow::anyhow!("the answer broke off: {e}"))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    check(&trailers)?;
    ensure!(
        trailers.contains_key("grpc-status") || head.headers.contains_key("grpc-status"),
        "the answer is not gRPC's: it has no status"
    );
    unframe(&body.to_bytes())
}

/// Not compressed, and its length.
fn frame(message: &[u8]) -> Result<Bytes> {
    let length = u32::try_from(message.len()).context("the message is too long")?;
    Ok([&[0], &length.to_be_bytes()[..], message].concat().into())
}

fn unframe(body: &Bytes) -> Result<Bytes> {
    let head = body.first_chunk::<5>().context("the answer has no message")?;
    let [compressed, length @ ..] = *head;
    let message = body.slice(5..);
    ensure!(
        compressed == 0 && message.len() == u32::from_be_bytes(length) as usize,
        "the answer is cut or compressed"
    );
    Ok(message)
}

fn check(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(status) => {
            bail!("it refused with gRPC status {status}: {}", text("grpc-message").unwrap_or("no message"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_written_and_nothing_else_is() {
        for message in [&b""[..], b"x", &[7; 70_000]] {
            assert_eq!(unframe(&frame(message).unwrap()).unwrap(), message);
        }
        for broken in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x02x", b"\0\0\0\0\0x", b"\x01\0\0\0\x01x"] {
            assert!(unframe(&Bytes::copy_from_slice(broken)).is_err(), "{broken:?}");
        }
    }

    #[tokio::test]
    async fn who_is_no_collector_is_named() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = call(&nobody.to_string(), "/x", b"").await.unwrap_err();
        assert!(format!("{error:#}").starts_with("it cannot be reached: "), "{error:#}");
        assert!(call("no port", "/x", b"").await.is_err());
    }
}

//! `/healthz`, `/readyz` and `/metrics` over plain HTTP (cli-and-service.md section 10).
//!
//! Upstream is always ready; here `/readyz` answers 503 until TUN, DNS servers and a relay are up and the portal was
//! reached. A later portal outage does not make a gateway unready: its clients go on. Both say what they know as JSON.

mod readiness;

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Bytes,
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;

pub use self::readiness::Readiness;
use crate::metrics::{Exporter, Format};

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// What the server knows.
pub struct Server {
    readiness: Arc<Readiness>,
    exporter: Arc<Exporter>,
    started: Instant,
}

impl Server {
    /// Started now.
    pub fn new(readiness: Arc<Readiness>, exporter: Arc<Exporter>) -> Self {
        Self { readiness, exporter, started: Instant::now() }
    }

    /// Serves until the runtime ends. A gateway without its health port still carries traffic, so a failed bind is a
    /// WARN that names the variable, not an exit.
    pub async fn serve(self, addr: SocketAddr) {
        let listener = match TcpListener::bind(addr).await {
            Ok(listener) => listener,
            Err(e) => {
                tracing::warn!(
                    "No health endpoint and no metrics: cannot listen on HEALTH_CHECK_ADDR {addr}: {e}; choose a free \
                     address"
                );
                return;
            }
        };
        let server = Arc::new(self);
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, usually: leave the processor to those who can free some.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let server = Arc::clone(&server);
                    async move { Ok::<_, Infallible>(server.respond(&request).await) }
                });
                // A client that goes away mid-request is its own business.
                let _ = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(Duration::from_secs(5))
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }

    async fn respond<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if !matches!(path, "/healthz" | "/readyz" | "/metrics") {
            return answer(StatusCode::NOT_FOUND, TEXT, "");
        }
        if request.method() != Method::GET {
            let mut refusal = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, "");
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
            return refusal;
        }
        match path {
            "/healthz" => {
                let body = json!({ "alive": true, "uptime_seconds": self.started.elapsed().as_secs() });
                answer(StatusCode::OK, JSON, body.to_string())
            }
            "/readyz" => {
                let report = self.readiness.report(SystemTime::now());
                let ready = report["ready"] == true;
                let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                answer(status, JSON, report.to_string())
            }
            _ => {
                let accept = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
                let format = Format::accepted(&accept.collect::<Vec<_>>().join(","));
                match self.exporter.page(format).await {
                    Some(page) => answer(StatusCode::OK, format.content_type(), page),
                    None => {
                        answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, "The control thread does not answer\n")
                    }
                }
            }
        }
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let body = body.into();
    let is_empty = body.is_empty();
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    if !is_empty {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;
    use crate::{dns::Stats, metrics};

    fn server() -> (Server, metrics::Asks, Arc<Stats>) {
        let stats = Arc::<Stats>::default();
        let (exporter, asks) = metrics::channel();
        (Server::new(Arc::new(Readiness::new(Arc::clone(&stats))), Arc::new(exporter)), asks, stats)
    }

    async fn ask(server: &Server, method: &str, path: &str) -> (u16, String, String) {
        let request = Request::builder().method(method).uri(path).body(()).unwrap();
        let response = server.respond(&request).await;
        let content_type =
            response.headers().get(CONTENT_TYPE).map(|value| value.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, content_type.unwrap_or_default(), String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn every_path_and_method_has_its_status() {
        // Without a loop that answers, there are no metrics.
        let (server, asks, stats) = server();
        drop(asks);
        let table = [
            ("GET", "/healthz", 200),
            ("GET", "/readyz", 503),
            ("GET", "/metrics", 503),
            ("POST", "/healthz", 405),
            ("HEAD", "/readyz", 405),
            ("PUT", "/metrics", 405),
            ("GET", "/x", 404),
            ("GET", "/", 404),
            ("GET", "/metrics/", 404),
            ("POST", "/x", 404),
        ];
        for (method, path, expect) in table {
            assert_eq!(ask(&server, method, path).await.0, expect, "{method} {path}");
        }
        server.readiness.tun.set(true);
        server.readiness.relay.set(true);
        stats.listening.set(true);
        assert_eq!(ask(&server, "GET", "/readyz").await.0, 503);
        server.readiness.on_portal_joined();
        assert_eq!(ask(&server, "GET", "/readyz").await.0, 200);
        server.readiness.on_portal_failed();
        assert_eq!(ask(&server, "GET", "/readyz").await.0, 200, "a portal that is away makes nobody unready");
        server.readiness.relay.set(false);
        assert_eq!(ask(&server, "GET", "/readyz").await.0, 503);
    }

    #[tokio::test]
    async fn bodies_are_json() {
        let (server, ..) = server();
        for (path, key) in [("/healthz", "alive"), ("/readyz", "ready")] {
            let (_, content_type, body) = ask(&server, "GET", path).await;
            assert_eq!(content_type, "application/json", "{path}");
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body[key], path == "/healthz", "{path}: {body}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_hangs_is_not_waited_for_forever() {
        // Held, and never looked at.
        let (server, _asks, _) = server();
        let begin = tokio::time::Instant::now();
        let (status, _, body) = ask(&server, "GET", "/metrics").await;
        assert_eq!(status, 503, "{body}");
        assert!(body.contains("does not answer"), "{body}");
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert_eq!(ask(&server, "GET", "/healthz").await.0, 200);
    }
}

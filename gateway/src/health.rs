//! `/healthz` and `/readyz` over plain HTTP (cli-and-service.md section 10).
//!
//! Upstream is always ready; here `/readyz` says what is missing, with status 503 until the portal has told us our
//! addresses and the TUN carries them. A later portal outage does not make a gateway unready: its clients go on.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

/// What `/readyz` reports; shared between the event loop and the server.
#[derive(Debug, Default)]
pub struct Readiness {
    /// The TUN carries the addresses the portal assigned.
    pub interface_up: AtomicBool,
    /// The portal has acknowledged our join, now.
    pub portal_connected: AtomicBool,
    /// At least one relay answers, now.
    pub relay_usable: AtomicBool,
}

impl Readiness {
    fn report(&self) -> (StatusCode, String) {
        let up = self.interface_up.load(Ordering::Relaxed);
        let body = serde_json::json!({
            "interface_up": up,
            "portal_connected": self.portal_connected.load(Ordering::Relaxed),
            "relay_usable": self.relay_usable.load(Ordering::Relaxed),
        });
        (if up { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

/// Serves until the runtime ends. A gateway without its health port still carries traffic, so a failed bind is a
/// WARN that names the variable, not an exit.
pub async fn serve(addr: SocketAddr, readiness: Arc<Readiness>) {
    let listener = match TcpListener::bind(addr).await {
        Ok(listener) => listener,
        Err(e) => {
            tracing::warn!(
                "No health endpoint: cannot listen on HEALTH_CHECK_ADDR {addr}: {e}; choose a free address"
            );
            return;
        }
    };
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, usually: leave the processor to those who can free some.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let readiness = Arc::clone(&readiness);
        tokio::spawn(async move {
            let service =
                service_fn(|request| std::future::ready(Ok::<_, Infallible>(respond(&request, &readiness))));
            // A client that goes away mid-request is its own business.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(std::time::Duration::from_secs(5))
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn respond<B>(request: &Request<B>, readiness: &Readiness) -> Response<Full<Bytes>> {
    let (status, body) = match (request.uri().path(), request.method()) {
        ("/healthz", &Method::GET) => (StatusCode::OK, String::new()),
        ("/readyz", &Method::GET) => readiness.report(),
        ("/healthz" | "/readyz", _) => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
        _ => (StatusCode::NOT_FOUND, String::new()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_and_method_has_its_status() {
        let readiness = Readiness::default();
        let ask = |method: &str, path: &str| {
            respond(&Request::builder().method(method).uri(path).body(()).unwrap(), &readiness)
                .status()
                .as_u16()
        };
        let table = [
            ("GET", "/healthz", 200),
            ("GET", "/readyz", 503),
            ("POST", "/healthz", 405),
            ("GET", "/x", 404),
        ];
        for (method, path, expect) in table {
            assert_eq!(ask(method, path), expect, "{method} {path}");
        }
        readiness.interface_up.store(true, Ordering::Relaxed);
        assert_eq!(ask("GET", "/readyz"), 200);
    }
}

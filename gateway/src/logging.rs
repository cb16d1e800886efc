//! The log on standard output (cli-and-service.md section 9).

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use tracing_subscriber::{
    EnvFilter, fmt, fmt::time::ChronoUtc, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::cli::LogFormat;

/// Libraries that talk more than they say. boringtun logs ordinary time-outs at WARN and ERROR: we log those
/// ourselves (design.md section 2.1). hickory warns of every stray datagram. stun_types warns about what any stranger can
/// send, and traces keys.
const QUIET: &str = "boringtun=off,netlink_proto=warn,netlink_packet_route=warn,rustls=warn,\
                     hickory_proto=error,hickory_net=error,hickory_resolver=error,\
                     tungstenite=info,tokio_tungstenite=info,is=info,\
                     quinn_udp=info,aya=info,mio=info,hyper=info,hyper_util=info,\
                     stun_types=off,stun_proto=off,turn_types=off";

/// The target of what each part says at DEBUG when it ends in order: what is left in its queues and the most that ever
/// waited. `RUST_LOG=info,firezone_gateway::rest=debug` shows that and no more.
pub const REST: &str = "firezone_gateway::rest";

/// What `--flow-logs` adds.
const FLOW_LOGS: &str = "flow_logs=trace";

/// Installs the subscriber; `RUST_LOG` (default `info`) comes after the built-in directives and so wins.
///
/// # Errors
/// A `RUST_LOG` that does not parse.
pub fn init(format: LogFormat, flow_logs: bool) -> Result<()> {
    let rust_log =
        std::env::var("RUST_LOG").ok().filter(|s| !s.is_empty()).unwrap_or_else(|| "info".to_owned());
    let filter = filter(&rust_log, flow_logs).with_context(|| {
        format!("RUST_LOG is not a list of log directives: {rust_log:?}; try RUST_LOG=info")
    })?;
    let timer = ChronoUtc::new("%Y-%m-%dT%H:%M:%S%.3fZ".to_owned());
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Human => {
            registry.with(fmt::layer().with_timer(timer).with_ansi(std::io::stdout().is_terminal())).init()
        }
        LogFormat::Json => registry.with(fmt::layer().json().flatten_event(true).with_timer(timer)).init(),
    }
    Ok(())
}

fn filter(rust_log: &str, flow_logs: bool) -> Result<EnvFilter> {
    let flow_logs = if flow_logs { FLOW_LOGS } else { "" };
    Ok(EnvFilter::builder().parse(format!("{QUIET},{flow_logs},{rust_log}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_logs_are_shown_by_the_flag_or_by_rust_log_which_has_the_last_word() {
        for (rust_log, flag, shown) in [
            ("info", false, false),
            ("info", true, true),
            ("warn", true, true),
            ("info,flow_logs=trace", false, true),
            ("info,flow_logs=off", true, false),
        ] {
            let subscriber = tracing_subscriber::registry().with(filter(rust_log, flag).unwrap());
            tracing::subscriber::with_default(subscriber, || {
                let is_shown = tracing::enabled!(target: "flow_logs", tracing::Level::TRACE);
                assert_eq!(is_shown, shown, "{rust_log}, {flag}");
                assert!(!tracing::enabled!(target: "stun_types", tracing::Level::ERROR));
            });
        }
        assert!(filter("info,=,", true).is_err());
    }
}

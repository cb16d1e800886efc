//! Switching the fast path of a gateway that runs. How no packet is lost meanwhile is `data/xsk/order.rs`'s.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::{
    ask::Asker,
    protocol::{FastPathMode, Refusal},
    server::silent,
    status::FastPath,
};

/// For how long whoever asked waits for the workers to follow; less than the command does.
const PATIENCE: Duration = Duration::from_secs(6);

/// Switches, and tells what is in use then. What is asked for is remembered where there is no interface for it yet.
///
/// # Errors
/// `no_fast_path`: there is none to switch on. `not_switched`: the workers or the kernel did not follow. `busy`: the event
/// loop is silent.
pub async fn switch(asker: &Asker, mode: FastPathMode) -> Result<Value, Refusal> {
    let before = asker.fast_path().await.ok_or_else(silent)?;
    if let Some(switcher) = &before.switcher {
        // `auto` is how the gateway began: in use wherever --fast-path permits.
        let switched = timeout(PATIENCE, switcher.switch(mode != FastPathMode::Off)).await;
        let switched = switched.map_err(|_| {
            let message = "The workers have not followed yet; `status` tells when they have";
            Refusal::new("not_switched", message)
        })?;
        switched.map_err(|e| {
            Refusal::new("not_switched", format!("The fast path is off, for it did not follow: {e:#}"))
        })?;
    }
    let after = asker.fast_path().await.ok_or_else(silent)?;
    let now = FastPath::from(&after.status);
    if after.switcher.is_none() && mode == FastPathMode::On {
        let message = format!(
            "There is no fast path to switch on: {}; start the gateway with --fast-path auto, and look at its log for \
             what the kernel lacks",
            now.words
        );
        return Err(Refusal::new("no_fast_path", message));
    }
    serde_json::to_value(now).map_err(|_| silent())
}

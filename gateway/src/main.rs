//! `firezone-gateway`: the daemon. This file is its start-up, in order; `runtime` is its life.

mod bpf;
mod cli;
#[allow(dead_code, reason = "main.rs is about to use it")]
mod data;
mod health;
mod identity;
mod logging;
#[cfg_attr(not(test), expect(dead_code, reason = "runtime.rs is about to use it"))]
mod portal;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser as _;

use crate::cli::Cli;

// With a clock that stands still no session would ever expire or be renewed.
const _: () =
    assert!(!gateway_proto::MOCK_CLOCK, "the daemon must not be built with gateway-proto's mock-instant");

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> Result<()> {
    if !cli.no_check && !identity::has_net_admin() {
        bail!("missing CAP_NET_ADMIN");
    }
    logging::init(cli.log_format)?;
    tracing::info!("{}", bpf::describe());
    let id = identity::gateway_id(cli.firezone_id.as_deref(), &identity::Places::default())?;
    let _ = (id, identity::name(cli.firezone_name), identity::token(cli.token, None)?, health::serve);
    Ok(())
}

//! `gateway-tests`: runs the scenarios, the demo and the benchmark; also the stand-ins and helpers that those start as processes.

use clap::{Parser, Subcommand};
use gateway_tests::{
    bench, demo,
    net::janitor,
    scenario,
    standins::{client, portal},
};

/// Tests of firezone-gateway in network namespaces that this program makes and removes.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the scenarios one after the other.
    Scenarios(scenario::Arguments),
    /// A client reaches a LAN through the gateway, directly and relayed; with a table of what that took.
    Demo(demo::Arguments),
    /// Measure the gateway beside plain WireGuard servers; `cargo xtask bench` builds everything and starts this.
    Bench(bench::Arguments),
    /// A portal for a daemon started by hand; prints tokens and every message.
    Portal(portal::Args),
    /// A client with its own TUN device; commands on standard input, events on standard output.
    Client(client::Args),
    /// A WireGuard client with one fixed peer, for the benchmark's plain WireGuard servers.
    #[command(hide = true)]
    WireguardClient(client::PlainArgs),
    /// Many clients in one process, without TUN devices.
    Swarm(client::SwarmArgs),
    /// Remove what the run with this pid leaves, once standard input ends.
    #[command(hide = true)]
    Janitor {
        /// The run.
        pid: u32,
    },
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    match Cli::parse().command {
        Command::Scenarios(arguments) => scenario::run(&arguments),
        Command::Demo(arguments) => demo::run_demo(&arguments),
        Command::Portal(arguments) => portal::main(arguments).map(|()| std::process::ExitCode::SUCCESS),
        Command::Client(arguments) => client::main(&arguments).map(|()| std::process::ExitCode::SUCCESS),
        Command::WireguardClient(arguments) => {
            client::plain_main(&arguments).map(|()| std::process::ExitCode::SUCCESS)
        }
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Swarm(arguments) => client::swarm_main(&arguments).map(|()| std::process::ExitCode::SUCCESS),
        Command::Janitor { pid } => {
            janitor::watch(pid)?;
            Ok(std::process::ExitCode::SUCCESS)
        }
    }
}

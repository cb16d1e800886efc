//! `firezone-gateway`: the daemon. This file is its start-up, in order; [`runtime`] is its life.

mod bpf;
mod cli;
mod clock;
mod condition;
#[cfg(test)]
mod count_allocations;
mod data;
mod dns;
mod flow_logs;
mod health;
mod identity;
mod logging;
mod metrics;
mod network;
mod operator;
mod portal;
mod runtime;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use gateway_proto::portal::{
    Generation,
    login_url::{LoginUrl, external_id},
};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::{
    cli::{Cli, Command, PortalEndpoint},
    data::{BufferSizes, Capabilities, DataPlane, TUN_NAME, interface::Interface, lock::InstanceLock},
    flow_logs::FlowLogs,
    health::Readiness,
    metrics::Destination,
    network::Network,
    portal::CaFile,
    runtime::{Runtime, Watched},
};

// With a clock that stands still no session would ever expire or be renewed.
const _: () =
    assert!(!gateway_proto::MOCK_CLOCK, "the daemon must not be built with gateway-proto's mock-instant");

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(command) = &cli.command {
        return match obey(command, &cli.control_socket) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => complain(&e),
        };
    }
    let prepared = match prepare(cli) {
        Ok(prepared) => prepared,
        // Nothing is running yet.
        Err(e) => return complain(&e),
    };
    match run(prepared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is not serving.
fn obey(command: &Command, socket: &Path) -> Result<()> {
    use operator::client::commands;
    match command {
        Command::Cleanup { upstream_rules } => network::cleanup::run(*upstream_rules),
        Command::Status { json } => commands::status(socket, *json),
        Command::Top => operator::top::run(socket),
        Command::Why { src, dst, protocol, port, json } => {
            commands::why(socket, (*src, *dst), protocol, *port, *json)
        }
        Command::Flows { client, limit, json } => commands::flows(socket, client.as_deref(), *limit, *json),
        Command::Bundle { output } => {
            let path = operator::bundle::run(socket, output.clone())?;
            println!("{}", path.display());
            Ok(())
        }
        Command::FastPath { mode } => commands::fast_path(socket, mode),
        Command::DistDocs { folder } => {
            operator::manual::write(folder)?.iter().for_each(|path| println!("{}", path.display()));
            Ok(())
        }
    }
}

/// One sentence, where it also reaches a terminal.
fn complain(error: &anyhow::Error) -> ExitCode {
    eprintln!("firezone-gateway: {error:#}");
    ExitCode::FAILURE
}

/// Everything that was checked before the machine is touched.
struct Prepared {
    portal: portal::Client,
    flow_logs: flow_logs::Config,
    metrics: Option<Destination>,
    log_flows: bool,
    private_key: StaticSecret,
    workers: usize,
    buffers: BufferSizes,
    allowed: Capabilities,
    health_check_addr: SocketAddr,
    control_socket: PathBuf,
    allow_own_ip: bool,
    dns_listen: BTreeSet<SocketAddr>,
    raise_buffer_limits: bool,
    set_up_network: bool,
    fast_path: data::fast::Config,
    _lock: InstanceLock,
}

/// Start-up, first half: an operator's mistake ends it in one sentence.
fn prepare(cli: Cli) -> Result<Prepared> {
    ensure!(
        cli.no_check || identity::has_net_admin(),
        "the gateway needs CAP_NET_ADMIN for its TUN device and routes, and it is not in the effective set; run as \
         root, grant it (setcap cap_net_admin+ep), or skip this check with --no-check"
    );
    logging::init(cli.log_format, cli.flow_logs)?;
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let token = identity::token(cli.token, credentials.as_deref())?;
    let id = identity::gateway_id(cli.firezone_id.as_deref(), &identity::Places::default())?;
    let private_key = StaticSecret::random();
    let public_key = PublicKey::from(&private_key);
    let name = identity::name(cli.firezone_name);
    let ca_files = ca_files(cli.ca_file);
    let flow_logs = flow_logs::Config {
        root: cli.flow_logs_dir,
        tls: portal::client_config(&ca_files)?,
        mark: Some(data::MARK),
        user_agent: portal::user_agent(portal::COMPAT_VERSION),
    };
    let portal = portal::Client::new(portal::Config {
        login: LoginUrl::new(&cli.api_url, &id, &name, public_key.as_bytes())?,
        token,
        ca_files,
        max_partition_time: cli.max_partition_time,
        generation: match cli.portal_endpoint {
            PortalEndpoint::Auto => None,
            PortalEndpoint::V2 => Some(Generation::V2),
            PortalEndpoint::V1 => Some(Generation::V1),
        },
        version: portal::COMPAT_VERSION.to_owned(),
        mark: true,
    })?;
    Ok(Prepared {
        portal,
        flow_logs,
        metrics: destination(cli.metrics, cli.otlp_grpc_endpoint, &id),
        log_flows: cli.flow_logs,
        private_key,
        workers: cli.workers.unwrap_or_else(one_per_core),
        buffers: BufferSizes::from_env()?,
        allowed: Capabilities::from_env()?,
        health_check_addr: cli.health_check_addr,
        control_socket: cli.control_socket,
        allow_own_ip: cli.allow_own_ip,
        dns_listen: cli.dns_listen.into_iter().collect(),
        raise_buffer_limits: !cli.no_inc_buf,
        set_up_network: !cli.no_network_setup,
        fast_path: data::fast::Config {
            wanted: cli.fast_path,
            bpffs: Some(cli.bpffs),
            clients: Some(cli.fast_path_clients),
        },
        _lock: InstanceLock::acquire(TUN_NAME)?,
    })
}

/// Start-up, second half, and the rest of the daemon's life.
fn run(prepared: Prepared) -> Result<()> {
    tracing::info!(
        arch = std::env::consts::ARCH,
        version = env!("CARGO_PKG_VERSION"),
        kernel = %rustix::system::uname().release().to_string_lossy(),
        "Starting firezone-gateway"
    );
    tracing::info!("{}", bpf::describe());
    if prepared.raise_buffer_limits {
        data::sysctl::raise_buffer_limits();
    }
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start the control thread's runtime")?;
    tokio.block_on(async {
        let data = DataPlane::start(data::Config {
            tun_name: TUN_NAME.to_owned(),
            workers: prepared.workers,
            private_key: prepared.private_key,
            allow_own_ip: prepared.allow_own_ip,
            seed: rand::random(),
            buffers: prepared.buffers,
            allowed: prepared.allowed,
            fast_path: prepared.fast_path,
        })?;
        let interface = Interface::new(TUN_NAME)?;
        let dns_stats = Arc::<dns::Stats>::default();
        let dns = dns::start(data::MARK, prepared.dns_listen, Arc::clone(&dns_stats))?;
        let flow_logs = FlowLogs::start(prepared.flow_logs)?;
        let readiness = Arc::new(Readiness::new(Arc::clone(&dns_stats)));
        let (exporter, asks) = metrics::channel();
        let exporter = Arc::new(exporter);
        let server = health::Server::new(Arc::clone(&readiness), Arc::clone(&exporter));
        tokio::spawn(server.serve(prepared.health_check_addr));
        let (asker, operator) = operator::channel();
        let server = operator::Server::new(asker, Arc::clone(&exporter));
        tokio::spawn(server.serve(prepared.control_socket));
        if let Some(to) = prepared.metrics {
            tokio::spawn(metrics::export(exporter, to));
        }
        let watched = Watched { readiness, dns: dns_stats, asks, operator };
        let flow_logs = (flow_logs, prepared.log_flows);
        let runtime = Runtime::new(data, interface, dns, flow_logs, prepared.portal, watched)?;
        // After the last thing that can fail, and where a signal is waited for already: what is set up is removed.
        let network = match prepared.set_up_network {
            true => Some(Network::set_up(TUN_NAME).await),
            false => None,
        };
        let result = runtime.run().await;
        if let Some(network) = network {
            network.tear_down().await;
        }
        result
    })
}

/// Where metrics are sent, if anywhere; `id` is the gateway's.
fn destination(wanted: Option<cli::Metrics>, endpoint: Option<String>, id: &str) -> Option<Destination> {
    match (wanted?, endpoint) {
        (cli::Metrics::Stdout, _) => Some(Destination::Stdout),
        (cli::Metrics::OtelCollector, Some(endpoint)) => {
            let further = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
            let resource = metrics::resource(&external_id(id), &further);
            Some(Destination::Collector { endpoint, resource })
        }
        (cli::Metrics::OtelCollector, None) => {
            tracing::warn!(
                "Metrics go nowhere: FIREZONE_METRICS is otel-collector, and OTLP_GRPC_ENDPOINT is not set"
            );
            None
        }
        (cli::Metrics::Sentry, _) => None,
    }
}

/// As many workers as cores that we may use.
fn one_per_core() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(gateway_common::maps::MAX_WORKERS))
}

/// Roots beside the bundled ones: the flag's, and the variable's that other programs read too.
fn ca_files(flag: Option<PathBuf>) -> Vec<CaFile> {
    let flag = flag.map(|path| CaFile { path, named_by: "--ca-file (FIREZONE_CA_FILE)" });
    let variable = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty());
    let variable = variable.map(|path| CaFile { path: path.into(), named_by: "SSL_CERT_FILE" });
    flag.into_iter().chain(variable).collect()
}

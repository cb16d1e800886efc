//! The command line and its environment variables (cli-and-service.md sections 1 and 2).
//!
//! Same names, defaults and precedence (argument, then variable, then default) as upstream's gateway, so that an
//! existing unit file or container definition starts this one unchanged. What is ours is marked so.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr as _,
    time::Duration,
};

use clap::{Parser, Subcommand, ValueEnum, builder::BoolishValueParser};
use gateway_common::maps::{MAX_CLIENTS, MAX_WORKERS};
use gateway_proto::portal::messages::Secret;
use zeroize::Zeroizing;

use crate::data::Wanted;

/// What only the environment says.
const VARIABLES: &str = "\
Further environment variables:
  FIREZONE_UDP_RECV_BUFFER_SIZE, FIREZONE_UDP_SEND_BUFFER_SIZE
          Kernel buffers of the UDP sockets, in bytes
  FIREZONE_DISABLE
          What to do without when looking for a fault, separated by commas: tun-offload, tun-uso, udp-gro,
          udp-gso, sendmmsg, reuseport-steering, tun-steering; the log says at start what is in use";

/// Connects clients to resources: WireGuard over direct UDP or TURN relays, under a portal's authorizations.
#[derive(Debug, Parser)]
#[command(
    name = "firezone-gateway",
    version,
    max_term_width = 110,
    after_long_help = VARIABLES,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The gateway's token. Without it, the systemd credential FIREZONE_TOKEN is read.
    #[arg(env = "FIREZONE_TOKEN", hide_env_values = true, value_parser = secret, help_heading = "Portal")]
    pub token: Option<Secret>,

    /// Base URL of the portal; http(s) or ws(s).
    #[arg(
        short = 'u',
        long,
        env = "FIREZONE_API_URL",
        default_value = "wss://api.firezone.dev",
        value_name = "URL",
        help_heading = "Portal"
    )]
    pub api_url: String,

    /// Name shown in the portal; the host name if absent.
    #[arg(short = 'n', long, env = "FIREZONE_NAME", value_name = "NAME", help_heading = "Portal")]
    pub firezone_name: Option<String>,

    /// Stable identity of this gateway; derived from the machine if absent.
    #[arg(short = 'i', long, env = "FIREZONE_ID", value_name = "ID", help_heading = "Portal")]
    pub firezone_id: Option<String>,

    /// PEM file with further root certificates for the portal's TLS; SSL_CERT_FILE is read too.
    #[arg(long, env = "FIREZONE_CA_FILE", value_name = "FILE", help_heading = "Portal")]
    pub ca_file: Option<PathBuf>,

    /// Which of the portal's gateway endpoints to use.
    #[arg(long, env = "FIREZONE_PORTAL_ENDPOINT", value_enum, default_value_t = PortalEndpoint::Auto, value_name = "WHICH", help_heading = "Portal")]
    pub portal_endpoint: PortalEndpoint,

    /// How long the portal may stay unreachable before the gateway gives up, e.g. 5m, 1h, 30d.
    #[arg(short = 'm', long, env = "FIREZONE_MAX_PARTITION_TIME", default_value = "24h", value_parser = humantime::parse_duration, value_name = "DURATION", help_heading = "Portal")]
    pub max_partition_time: Duration,

    /// Threads that carry traffic, 1 to 64; as many as there are cores if absent.
    #[arg(long, env = "FIREZONE_WORKERS", value_parser = workers, value_name = "N", help_heading = "Data plane")]
    pub workers: Option<usize>,

    /// How datagrams may pass the socket layer by (XDP and AF_XDP): auto takes the best that the interface towards the
    /// relays offers, and leaves virtual ones alone; the others are exactly that, or nothing. The log says what became of
    /// it. Off by default until it has been measured on network cards.
    #[arg(
        long,
        env = "FIREZONE_FAST_PATH",
        default_value = "off",
        value_parser = Wanted::from_str,
        value_name = "auto|off|generic|native|zerocopy",
        help_heading = "Data plane"
    )]
    pub fast_path: Wanted,

    /// For how many clients the kernel's maps have room with a fast path, 1 to 1048576. They take 192 bytes for each, and
    /// more when it comes; with more clients than that the sockets carry for all.
    #[arg(
        long,
        env = "FIREZONE_FAST_PATH_CLIENTS",
        default_value_t = CLIENTS,
        value_parser = clap::value_parser!(u32).range(1..=1 << 20),
        value_name = "N",
        help_heading = "Data plane"
    )]
    pub fast_path_clients: u32,

    /// Where the maps of the kernel programs get their names, for bpftool: a folder in a bpffs.
    #[arg(
        long,
        env = "FIREZONE_BPFFS",
        default_value = "/sys/fs/bpf/firezone-gateway",
        value_name = "DIR",
        help_heading = "Data plane"
    )]
    pub bpffs: PathBuf,

    /// Let clients reach every port of the gateway's own tunnel address, not only DNS (53535) and ping.
    #[arg(long, env = "FIREZONE_ALLOW_OWN_IP", value_parser = BoolishValueParser::new(), help_heading = "Data plane")]
    pub allow_own_ip: bool,

    /// Further addresses to serve DNS on, besides the tunnel's (ours): an IP address and a port each, separated by commas.
    /// Whoever reaches them may ask this machine's nameservers.
    #[arg(
        long,
        env = "FIREZONE_DNS_LISTEN",
        value_parser = one_address,
        value_delimiter = ',',
        value_name = "ADDR",
        help_heading = "Data plane"
    )]
    pub dns_listen: Vec<SocketAddr>,

    /// Leave forwarding and nftables as they are: the machine is prepared otherwise. Without it the gateway turns
    /// forwarding on and keeps a table of its own, inet firezone_gateway, while it runs.
    #[arg(long, env = "FIREZONE_NO_NETWORK_SETUP", value_parser = BoolishValueParser::new(), help_heading = "Data plane")]
    pub no_network_setup: bool,

    /// Leave net.core.rmem_max and wmem_max as they are.
    #[arg(long, env = "FIREZONE_NO_INC_BUF", value_parser = BoolishValueParser::new(), help_heading = "Data plane")]
    pub no_inc_buf: bool,

    /// Log every TCP and UDP flow that has a token, and packets that are denied (target flow_logs), whether or not the
    /// portal wants them uploaded.
    #[arg(long, env = "FIREZONE_FLOW_LOGS", value_parser = BoolishValueParser::new(), help_heading = "Observe")]
    pub flow_logs: bool,

    /// Where flow logs wait until they are uploaded.
    #[arg(
        long,
        env = "FIREZONE_FLOW_LOGS_DIR",
        default_value = "/var/lib/firezone/flow_logs",
        value_name = "DIR",
        help_heading = "Observe"
    )]
    pub flow_logs_dir: PathBuf,

    /// Format of the log on standard output; RUST_LOG filters it.
    #[arg(long, env = "FIREZONE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human, value_name = "FORMAT", help_heading = "Observe")]
    pub log_format: LogFormat,

    /// Where /healthz, /readyz and /metrics (Prometheus) are served.
    #[arg(
        long,
        env = "HEALTH_CHECK_ADDR",
        default_value = "0.0.0.0:8080",
        value_name = "ADDR",
        help_heading = "Observe"
    )]
    pub health_check_addr: SocketAddr,

    /// Unix socket by which `status`, `why`, `flows`, `top`, `bundle` and `fast-path` ask the gateway that runs.
    #[arg(
        long,
        env = "FIREZONE_CONTROL_SOCKET",
        default_value = "/run/firezone-gateway/control.sock",
        value_name = "PATH",
        global = true,
        help_heading = "Observe"
    )]
    pub control_socket: PathBuf,

    /// Send metrics once a minute, besides showing them on /metrics.
    #[arg(long, env = "FIREZONE_METRICS", value_enum, value_name = "WHERE", help_heading = "Observe")]
    pub metrics: Option<Metrics>,

    /// OpenTelemetry collector for `--metrics otel-collector`: host and port of its gRPC receiver, without TLS.
    #[arg(long, env = "OTLP_GRPC_ENDPOINT", value_name = "HOST:PORT", value_parser = endpoint, help_heading = "Observe")]
    pub otlp_grpc_endpoint: Option<String>,

    /// Skip the check for CAP_NET_ADMIN at start.
    #[arg(long, help_heading = "Other")]
    pub no_check: bool,

    /// Accepted for compatibility: this gateway never reports to anybody.
    #[arg(long, env = "FIREZONE_NO_TELEMETRY", value_parser = BoolishValueParser::new(), hide = true)]
    pub no_telemetry: bool,
}

/// What the program does besides serving.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Show clients, relays, workers and the rest, as `wg show` does.
    Status {
        /// Everything, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Show live rates of clients and workers. Keys: q ends, s sorts, r reverses, arrows scroll.
    Top,
    /// Say what becomes of such a packet and why: which resource permits it, or what to change so that one does.
    Why {
        /// Where it comes from: a client's tunnel address, or a resource's for what goes to a client.
        #[arg(value_name = "SRC")]
        src: IpAddr,
        /// Where it goes.
        #[arg(value_name = "DST")]
        dst: IpAddr,
        /// tcp, udp, icmp or a protocol number.
        #[arg(value_name = "PROTO")]
        protocol: String,
        /// The resource's port.
        #[arg(value_name = "PORT")]
        port: Option<u16>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// List open flows, the newest first; they are counted while flow logs are on.
    Flows {
        /// Only this client's.
        #[arg(long, value_name = "ID")]
        client: Option<String>,
        /// At most so many, up to 500.
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: usize,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Write an archive for who helps: status, metrics, counters, versions, kernel settings; no token, key or user.
    Bundle {
        /// The new file; firezone-gateway-TIME.tar if absent.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Switch the fast path of the gateway that runs, without losing packets; says what is in use then, and why.
    FastPath {
        /// Use it, do not, or again as --fast-path of that gateway says.
        #[arg(value_name = "MODE", value_parser = ["on", "off", "auto"])]
        mode: String,
    },
    /// Write shell completions and man pages.
    #[command(hide = true)]
    DistDocs {
        /// Into this folder.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Remove what a gateway left behind that was killed: nftables table, routing rules, changed settings.
    Cleanup {
        /// Delete instead the iptables rules that upstream's firezone-gateway-init added, and nothing else.
        #[arg(long)]
        upstream_rules: bool,
    },
}

/// The portal's two generations of gateway endpoint (portal-protocol.md section 12).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PortalEndpoint {
    /// v2, and v1 if the portal does not know v2.
    Auto,
    /// `/gateway/v2/websocket`.
    V2,
    /// `/gateway/websocket`.
    V1,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// One line of text per event.
    Human,
}

/// Where metrics are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Metrics {
    /// To standard output, as on /metrics.
    Stdout,
    /// To an OpenTelemetry collector.
    OtelCollector,
    /// Accepted for compatibility: this gateway never reports to anybody unasked.
    #[value(hide = true)]
    Sentry,
}

#[expect(clippy::unnecessary_wraps, reason = "clap's value parsers are fallible")]
fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret(Zeroizing::new(text.to_owned())))
}

#[expect(clippy::cast_possible_truncation, reason = "65536")]
const CLIENTS: u32 = MAX_CLIENTS as u32;

/// From 1 to [`MAX_WORKERS`].
fn workers(text: &str) -> Result<usize, String> {
    let number = text.trim().parse().ok().filter(|number| (1..=MAX_WORKERS).contains(number));
    number.ok_or_else(|| format!("the number of workers must be from 1 to {MAX_WORKERS}"))
}

/// A host and a port.
fn endpoint(text: &str) -> Result<String, String> {
    let text = text.trim();
    let is_one = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if is_one { Ok(text.to_owned()) } else { Err("expected host:port, without a scheme".to_owned()) }
}

/// An address and a port that a socket can be bound to, and only that one: a wildcard would take the tunnel's as well.
fn one_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.trim().parse().map_err(|_| "expected an IP address and a port, like 192.0.2.1:53".to_owned())?;
    if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
        return Err("name one address of this machine, and a port above 0".to_owned());
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn help_names_every_word_of_firezone_disable() {
        for capability in crate::data::capabilities::Capability::ALL {
            assert!(VARIABLES.contains(capability.word()), "{}", capability.word());
        }
    }

    /// What `--help` says, of the daemon and of each command: a change of it is a change of a file. `UPDATE_HELP=1` writes it.
    #[test]
    fn help_is_what_help_txt_says() {
        // What is in the environment of this run, and how wide its terminal is, is not the program's.
        let mut command =
            Cli::command().term_width(100).mut_args(|arg| arg.hide_env_values(true)).version("VERSION");
        command.build();
        let mut text = command.render_long_help().to_string();
        for sub in command.get_subcommands_mut().filter(|sub| !sub.is_hide_set()) {
            let help = sub.render_long_help();
            text.push_str(&format!("\n===== {} =====\n{help}", sub.get_name()));
        }
        let text = text.lines().map(|line| line.trim_end().to_owned() + "\n").collect::<String>();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/help.txt");
        if std::env::var_os("UPDATE_HELP").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(path).unwrap_or_default();
        for (at, (is, was)) in text.lines().zip(golden.lines()).enumerate() {
            assert_eq!(is, was, "line {} of gateway/src/help.txt", at + 1);
        }
        assert_eq!(text.lines().count(), golden.lines().count(), "gateway/src/help.txt has other lines");
    }

    #[test]
    fn commands_are_read_and_the_socket_may_be_named_before_and_after_them() {
        let table: [(&[&str], Command); 5] = [
            (&["--control-socket", "/s", "status", "--json"], Command::Status { json: true }),
            (&["top", "--control-socket", "/s"], Command::Top),
            (
                &["why", "100.64.0.7", "10.0.0.5", "tcp", "443", "--control-socket=/s"],
                Command::Why {
                    src: "100.64.0.7".parse().unwrap(),
                    dst: "10.0.0.5".parse().unwrap(),
                    protocol: "tcp".to_owned(),
                    port: Some(443),
                    json: false,
                },
            ),
            (
                &["flows", "--limit=7", "--control-socket=/s"],
                Command::Flows { client: None, limit: 7, json: false },
            ),
            (&["fast-path", "off", "--control-socket=/s"], Command::FastPath { mode: "off".to_owned() }),
        ];
        for (arguments, expect) in table {
            let cli = Cli::try_parse_from([&["firezone-gateway"], arguments].concat()).unwrap();
            assert_eq!(cli.command, Some(expect), "{arguments:?}");
            assert_eq!(cli.control_socket, PathBuf::from("/s"), "{arguments:?}");
        }
        for arguments in [&["fast-path", "maybe"][..], &["why", "x", "10.0.0.5", "tcp"], &["why", "::1"]] {
            assert!(
                Cli::try_parse_from([&["firezone-gateway"], arguments].concat()).is_err(),
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn short_flags_of_upstream_are_accepted() {
        let cli = Cli::parse_from([
            "firezone-gateway",
            "-u",
            "ws://portal:8081",
            "-n",
            "gw",
            "-i",
            "id",
            "-m",
            "5m",
            "tok",
        ]);
        assert_eq!(cli.api_url, "ws://portal:8081");
        assert_eq!(cli.firezone_name.as_deref(), Some("gw"));
        assert_eq!(cli.firezone_id.as_deref(), Some("id"));
        assert_eq!(cli.max_partition_time, Duration::from_secs(300));
        assert_eq!(cli.token.map(|t| t.0.to_string()).as_deref(), Some("tok"));
    }

    #[test]
    fn cleanup_is_a_command_and_other_words_are_tokens() {
        let parse = |arguments: &[&str]| Cli::try_parse_from([&["firezone-gateway"], arguments].concat());
        let table: [(&[&str], Option<Command>); 4] = [
            (&[], None),
            (&["help"], None),
            (&["cleanup"], Some(Command::Cleanup { upstream_rules: false })),
            (&["cleanup", "--upstream-rules"], Some(Command::Cleanup { upstream_rules: true })),
        ];
        for (arguments, expect) in table {
            assert_eq!(parse(arguments).unwrap().command, expect, "{arguments:?}");
        }
        assert_eq!(parse(&["help"]).unwrap().token.map(|t| t.0.to_string()).as_deref(), Some("help"));
        assert!(parse(&["--upstream-rules"]).is_err());
    }

    #[test]
    fn workers_are_from_one_to_64() {
        for (text, expect) in
            [("1", Some(1)), ("64", Some(64)), ("0", None), ("65", None), ("-1", None), ("many", None)]
        {
            let cli = Cli::try_parse_from(["firezone-gateway", &format!("--workers={text}")]);
            match expect {
                Some(_) => assert_eq!(cli.unwrap().workers, expect),
                None => assert!(
                    cli.unwrap_err().to_string().contains("the number of workers must be from 1 to 64"),
                    "{text}"
                ),
            }
        }
    }

    #[test]
    fn dns_servers_listen_on_single_addresses() {
        let two = Cli::parse_from(["firezone-gateway", "--dns-listen=192.0.2.1:53, [::1]:5353"]);
        assert_eq!(two.dns_listen, ["192.0.2.1:53".parse().unwrap(), "[::1]:5353".parse().unwrap()]);
        assert_eq!(Cli::parse_from(["firezone-gateway"]).dns_listen, []);
        for text in
            ["0.0.0.0:53", "[::]:53", "224.0.0.251:53", "192.0.2.1:0", "192.0.2.1", "localhost:53", ""]
        {
            let result = Cli::try_parse_from(["firezone-gateway", &format!("--dns-listen={text}")]);
            assert!(result.is_err(), "{text}");
        }
    }

    #[test]
    fn a_collector_is_a_host_and_a_port() {
        for text in ["collector:4317", "192.0.2.1:4317", "[2001:db8::1]:4317"] {
            let flags = ["firezone-gateway", "--metrics", "otel-collector", "--otlp-grpc-endpoint", text];
            let cli = Cli::parse_from(flags);
            assert_eq!(cli.otlp_grpc_endpoint.as_deref(), Some(text));
            assert_eq!(cli.metrics, Some(Metrics::OtelCollector));
        }
        for text in ["http://collector:4317", "collector", ":4317", "collector:0", "collector:99999", ""] {
            let result = Cli::try_parse_from(["firezone-gateway", "--otlp-grpc-endpoint", text]);
            assert!(result.is_err(), "{text}");
        }
        assert_eq!(Cli::parse_from(["firezone-gateway", "--metrics=sentry"]).metrics, Some(Metrics::Sentry));
    }

    #[test]
    fn the_fast_path_is_one_of_five_words() {
        use crate::data::fast::Mode::{Generic, Native, ZeroCopy};
        let table = [
            ("auto", Wanted::Auto),
            ("off", Wanted::Off),
            ("generic", Wanted::Exactly(Generic)),
            ("native", Wanted::Exactly(Native)),
            ("zerocopy", Wanted::Exactly(ZeroCopy)),
        ];
        assert_eq!(Cli::parse_from(["firezone-gateway"]).fast_path, Wanted::Off);
        for (word, expect) in table {
            assert_eq!(Cli::parse_from(["firezone-gateway", "--fast-path", word]).fast_path, expect);
        }
        assert_eq!(Cli::parse_from(["firezone-gateway"]).fast_path_clients, 65_536);
        assert_eq!(Cli::parse_from(["firezone-gateway", "--fast-path-clients=1"]).fast_path_clients, 1);
        for number in ["0", "1048577", "-1", "many"] {
            let argument = format!("--fast-path-clients={number}");
            let refused = Cli::try_parse_from(["firezone-gateway", &argument]).unwrap_err().to_string();
            assert!(refused.contains("--fast-path-clients"), "{refused}");
        }
        let refused = Cli::try_parse_from(["firezone-gateway", "--fast-path=fast"]).unwrap_err().to_string();
        assert!(refused.contains("must be auto, off, generic, native or zerocopy"), "{refused}");
    }

    #[test]
    fn the_token_never_reaches_debug_output() {
        let cli = Cli::parse_from(["firezone-gateway", "very-secret"]);
        assert!(!format!("{cli:?}").contains("very-secret"));
    }
}

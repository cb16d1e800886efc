//! Real servers: coturn as relay; nginx, iperf3 and dnsmasq on the LAN.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};
use sha2::{Digest as _, Sha256};

use super::{
    NetNs,
    process::{Logs, Process, Spawn, wait_for},
    topology::LAN_HOST,
};

/// Programs that scenarios need, with the Debian package of each.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("turnserver", "coturn"),
    ("nginx", "nginx-light"),
    ("iperf3", "iperf3"),
    ("dnsmasq", "dnsmasq-base"),
    ("dig", "bind9-dnsutils"),
    ("curl", "curl"),
    ("ping", "iputils-ping"),
    ("traceroute", "traceroute"),
];

/// The programs of [`PROGRAMS`] that are not installed, as `program (package)`.
pub fn missing_programs() -> Vec<String> {
    missing_of(PROGRAMS)
}

/// The same of another list of `(program, package)`.
pub fn missing_of(programs: &[(&str, &str)]) -> Vec<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).exists());
    programs
        .iter()
        .filter(|(p, _)| !installed(p))
        .map(|(p, package)| format!("{p} (package {package})"))
        .collect()
}

/// The name that the LAN's DNS server answers with [`LAN_HOST`].
pub const DNS_NAME: &str = "files.lan.test";

/// A coturn that takes the REST credentials of `secret`: user `expiry:name`, password the base64 of HMAC-SHA1.
#[derive(Debug)]
pub struct Relay {
    process: Process,
}

impl Relay {
    /// Starts coturn on `addresses`, port 3478, and waits until it listens.
    ///
    /// # Errors
    /// If it does not come up within 5 s.
    pub fn start(
        namespace: &NetNs,
        logs: &Logs,
        name: &str,
        addresses: &[IpAddr],
        secret: &str,
    ) -> Result<Self> {
        let folder = logs.file(name);
        std::fs::create_dir_all(&folder)?;
        let mut command: Vec<String> =
            ["turnserver", "-n", "--realm=firezone", "--use-auth-secret", "--fingerprint"]
                .into_iter()
                .chain([
                    "--no-tls",
                    "--no-dtls",
                    "--no-tcp-relay",
                    "--no-cli",
                    "--no-multicast-peers",
                    "--no-rfc5780",
                ])
                .chain(["--log-file=stdout", "--min-port=49152", "--max-port=65535", "--listening-port=3478"])
                .map(str::to_owned)
                .collect();
        command.push(format!("--static-auth-secret={secret}"));
        command.push(format!("--userdb={}", folder.join("turndb").display()));
        command.push(format!("--pidfile={}", folder.join("pid").display()));
        for address in addresses {
            command.push(format!("--listening-ip={address}"));
            command.push(format!("--relay-ip={address}"));
        }
        let mut process = Process::spawn(namespace, logs, &Spawn { name, command, ..Spawn::default() })
            .context("coturn")?;
        let address = SocketAddr::new(*addresses.first().context("a relay has an address")?, 3478);
        // It listens on TCP and UDP; TCP tells when.
        wait_until_listening(namespace, &mut process, address)?;
        Ok(Self { process })
    }

    /// The coturn process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The LAN host's servers.
#[derive(Debug)]
pub struct LanServers {
    /// Served as `/big`.
    pub big: BigFile,
    uploads: PathBuf,
    http_log: PathBuf,
    _processes: Vec<Process>,
}

impl LanServers {
    /// Starts HTTP on port 80 and 8080, iperf3 on 5201 and 5202, DNS on 53, on every address of the LAN host.
    ///
    /// # Errors
    /// If one does not come up within 5 s.
    pub fn start(namespace: &NetNs, logs: &Logs, big: BigFile) -> Result<Self> {
        let folder = logs.file("http");
        let uploads = folder.join("put");
        std::fs::create_dir_all(&uploads)?;
        let http_log = folder.join("access.txt");
        let config = folder.join("nginx.conf");
        std::fs::write(&config, nginx_config(&folder, &uploads, &http_log, &big.path))?;

        let spawn = |name: &str, command: &[&str]| {
            let command = command.iter().map(|&word| word.to_owned()).collect();
            Process::spawn(namespace, logs, &Spawn { name, command, ..Spawn::default() })
        };
        let error_log = folder.join("error.txt").display().to_string();
        let mut http = spawn("http", &["nginx", "-e", &error_log, "-c", &config.display().to_string()])?;
        let mut iperf = spawn("iperf3", &["iperf3", "-s", "-p", "5201"])?;
        let mut iperf_2 = spawn("iperf3-2", &["iperf3", "-s", "-p", "5202"])?;
        let mut dns_command = vec!["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root"];
        dns_command.extend(["--no-resolv", "--no-hosts", "--pid-file=", "--log-facility=-", "--log-queries"]);
        let record = format!("--host-record={DNS_NAME},{},{}", LAN_HOST.0, LAN_HOST.1);
        dns_command.push(&record);
        let mut dns = spawn("dns", &dns_command)?;

        let at = |port| SocketAddr::new(LAN_HOST.0.into(), port);
        wait_until_listening(namespace, &mut http, at(80))?;
        wait_until_listening(namespace, &mut iperf, at(5201))?;
        wait_until_listening(namespace, &mut iperf_2, at(5202))?;
        wait_until_listening(namespace, &mut dns, at(53))?;
        Ok(Self { big, uploads, http_log, _processes: vec![http, iperf, iperf_2, dns] })
    }

    /// SHA-256 of what was uploaded with `PUT /put/<name>`.
    ///
    /// # Errors
    /// If there is no such upload.
    pub fn uploaded(&self, name: &str) -> Result<[u8; 32]> {
        checksum(&self.uploads.join(name))
    }

    /// nginx's access log: `client-address "request" status bytes` per line.
    pub fn http_log(&self) -> String {
        std::fs::read_to_string(&self.http_log).unwrap_or_default()
    }
}

/// A file of pseudo-random bytes, made once per run.
#[derive(Debug, Clone)]
pub struct BigFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its checksum.
    pub sha256: [u8; 32],
}

impl BigFile {
    /// Bytes in the file: 100 MB.
    pub const LENGTH: usize = 100_000_000;

    /// Makes it in `folder`, or finds it there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn make(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join("big");
        if !path.exists() {
            let mut bytes = vec![0; Self::LENGTH];
            SmallRng::seed_from_u64(100).fill_bytes(&mut bytes);
            std::fs::write(&path, bytes)?;
        }
        let sha256 = checksum(&path)?;
        Ok(Self { path, sha256 })
    }

    /// An empty one, where nobody fetches it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn empty(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join("big");
        std::fs::write(&path, [])?;
        Ok(Self { sha256: checksum(&path)?, path })
    }
}

/// SHA-256 of a file.
///
/// # Errors
/// If it cannot be read.
pub fn checksum(path: &Path) -> Result<[u8; 32]> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Sha256::digest(bytes).into())
}

fn nginx_config(folder: &Path, uploads: &Path, log: &Path, big: &Path) -> String {
    let folder = folder.display();
    let uploads = uploads.parent().unwrap_or(uploads).display();
    let log = log.display();
    let big = big.parent().unwrap_or(big).display();
    format!(
        r#"daemon off;
master_process off;
user root;
pid {folder}/pid;
events {{}}
http {{
  log_format short '$remote_addr "$request" $status $body_bytes_sent';
  access_log {log} short;
  client_max_body_size 1g;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  sendfile on;
  server {{
    listen 80;
    listen [::]:80;
    listen 8080;
    listen [::]:8080;
    location = / {{ default_type text/plain; return 200 "hello from the LAN\n"; }}
    location = /whoami {{ default_type text/plain; return 200 "$remote_addr\n"; }}
    location = /address {{ default_type text/plain; return 200 "$server_addr\n"; }}
    location = /big {{ root {big}; }}
    # Slow enough that something can happen to it on the way: about 20 s.
    location = /slow {{ alias {big}/big; limit_rate 5m; }}
    location /put/ {{ root {uploads}; dav_methods PUT; }}
  }}
}}
"#
    )
}

fn wait_until_listening(namespace: &NetNs, process: &mut Process, address: SocketAddr) -> Result<()> {
    namespace.run(|| {
        wait_for(&format!("{address} to listen"), Duration::from_secs(5), || {
            anyhow::ensure!(process.poll().is_none(), "the server ended: {}", process.log());
            Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok())
        })
        .map(drop)
    })
}

//! Flow logs: what ordinary programs carried is what the portal's endpoint gets, once, whatever happens on the way.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Context,
    lab::{GATEWAY_NAME, Lab, Options, PATIENCE, curl, lan4, launch},
    rest,
    start::certificates,
};
use crate::{
    net::{
        process::run,
        services::DNS_NAME,
        topology::{LAN_HOST, PORTAL},
    },
    standins::{
        ingest::{Answer, Ingest, Key, Record},
        portal::{FlowLogs, Role, Tls},
    },
};

const SECOND: Duration = Duration::from_secs(1);
/// A failure is followed by pauses that grow, and a pass comes each second.
pub(super) const UPLOADED: Duration = Duration::from_secs(20);

/// The endpoint, and how a gateway is started that uploads to it each second.
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
    tls: Tls,
    /// Where the gateway's spool is. The folders above it are the gateway's to make, and nobody else's to use.
    pub(super) spool: PathBuf,
}

impl Endpoint {
    /// Nobody listens there yet. `options` are changed.
    pub(super) fn new(cx: &Context, options: &mut Options) -> Result<Self> {
        let (tls, roots) = certificates(cx.logs.directory())?;
        let address = SocketAddr::new(PORTAL.into(), 443);
        let spool = cx.logs.file("state/gateway/flow_logs");
        options.flow_logs = FlowLogs {
            api_url: format!("https://{address}/"),
            upload_interval_secs: 1,
            upload_batch_size: 0,
        };
        options.launch.environment.extend([
            ("FIREZONE_FLOW_LOGS_DIR", spool.display().to_string()),
            ("FIREZONE_CA_FILE", roots.display().to_string()),
        ]);
        Ok(Self { address, tls, spool })
    }

    /// It listens.
    pub(super) fn start(&self, cx: &Context, lab: &Lab) -> Result<Ingest> {
        let (tls, key) = (self.tls.clone(), lab.portal.ingest_key());
        Ingest::start(&cx.topology.portal.namespace, self.address, tls, key)
    }
}

/// The closed record of the flow from this port, as soon as it was uploaded.
pub(super) fn closed(ingest: &Ingest, protocol: &str, port: impl Into<u64>) -> Result<Value> {
    let port = port.into();
    let record = |key: &Key| key.protocol == protocol && key.src.split(' ').nth(1) == Some(&port.to_string());
    let records = ingest.wait(&format!("the {protocol} flow from port {port}"), UPLOADED, |records| {
        records.iter().any(|(key, found)| record(key) && found.closed > 0)
    })?;
    let found = records.into_iter().find(|(key, found)| record(key) && found.closed > 0);
    Ok(found.context("what was just waited for")?.1.payload)
}

/// A gateway that uploads each second, a client with access to the LAN, the endpoint, how the gateway was started, and where its spool is.
fn start(cx: &Context) -> Result<(Lab, Ingest, Options, Endpoint)> {
    let mut options = Options { resources: vec![lan4()], ..Options::default() };
    let endpoint = Endpoint::new(cx, &mut options)?;
    let mut lab = Lab::start(cx, &options)?;
    let ingest = endpoint.start(cx, &lab)?;
    lab.connect(0, &[lan4()])?;
    Ok((lab, ingest, options, endpoint))
}

/// What curl says of a download: its port, the payload it sent and the payload it got.
struct Fetched {
    port: u64,
    sent: u64,
    got: u64,
}

fn fetch(cx: &Context, path: &str) -> Result<Fetched> {
    let say = "%{local_port} %{size_request} %{size_header} %{size_download}";
    let url = format!("http://{}{path}", LAN_HOST.0);
    let client = &cx.topology.clients[0].namespace;
    let said = curl(client, &["-f", "-o", "/dev/null", "-w", say, &url])?.success()?;
    let numbers = said.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    let [port, sent, header, body] = numbers[..] else { anyhow::bail!("curl said {said:?}") };
    Ok(Fetched { port, sent, got: header + body })
}

/// Records have the tuples and the payload bytes that both ends saw; what is open when the gateway ends is closed by it, and
/// uploaded by the next one. Files are nobody else's to read.
pub(super) fn counted(cx: &mut Context) -> Result<()> {
    let (mut lab, ingest, options, endpoint) = start(cx)?;
    let fetched = fetch(cx, "/")?;
    let record = closed(&ingest, "tcp", fetched.port)?;
    ensure!(record["tx_bytes"] == fetched.sent, "curl sent {}: {record}", fetched.sent);
    ensure!(record["rx_bytes"] == fetched.got, "curl got {}: {record}", fetched.got);
    ensure!(record["inner_dst_ip"] == LAN_HOST.0.to_string(), "{record}");
    ensure!(record["inner_dst_port"] == 80, "{record}");
    ensure!(record.get("domain").is_none(), "{record}");

    let client = &cx.topology.clients[0].namespace;
    let server = format!("@{}", LAN_HOST.0);
    let said = run(client, 5 * SECOND, &["dig", &server, DNS_NAME, "+noedns", "+nocookie"])?.success()?;
    let size = said.split("MSG SIZE  rcvd: ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let size: u64 = size.context("dig told no size")?.parse()?;
    modes(&endpoint.spool)?;

    // The flow of a query ends with the gateway.
    lab.terminate(10 * SECOND)?;
    let url = lab.portal.url();
    let mark = lab.portal.mark();
    lab.gateway = launch(cx, "gateway-again", &lab.gateway_token, &url, options.rust_log, &options.launch)?;
    lab.portal.wait_since(mark, PATIENCE, |entry| entry.to_gateway("init")).context(GATEWAY_NAME)?;
    ensure!(!lab.portal.online(Role::Gateway).is_empty(), "the gateway has gone");
    let udp = |(key, record): (&Key, &Record)| key.protocol == "udp" && record.closed > 0;
    let records = ingest.wait("the record of a query", UPLOADED, |records| records.iter().any(udp))?;
    let (_, query) = records.iter().find(|entry| udp(*entry)).context("what was just waited for")?;
    // Header, the name with a length before each label and the root's behind the last, type and class.
    let asked = 12 + DNS_NAME.len() as u64 + 2 + 4;
    ensure!(query.payload["tx_bytes"] == asked, "dig asked {asked} bytes: {}", query.payload);
    ensure!(query.payload["rx_bytes"] == size, "dig got {size} bytes: {}", query.payload);
    ensure!(query.payload["inner_dst_port"] == 53, "{}", query.payload);
    once(&ingest, 2, 1)?;
    lab.clients.clear();
    rest::terminate(&mut lab.gateway, 10 * SECOND, 1)
}

/// Directories are 0700, files 0600.
fn modes(folder: &Path) -> Result<()> {
    let mode = fs::metadata(folder)?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "{} has mode {mode:o}", folder.display());
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // What was uploaded meanwhile is gone.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            modes(&path)?;
        } else {
            let mode = metadata.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "{} has mode {mode:o}", path.display());
        }
    }
    Ok(())
}

/// So many flows are closed, none of them came more often, and no request was wrong.
fn once(ingest: &Ingest, flows: usize, most: usize) -> Result<()> {
    let records = ingest.records();
    let closed = records.values().filter(|record| record.closed > 0).count();
    ensure!(closed == flows && records.len() == flows, "{flows} flows are not these: {records:?}");
    ensure!(
        records.values().all(|record| record.closed <= most),
        "some came more than {most} times: {records:?}"
    );
    ensure!(ingest.complaints().is_empty(), "the endpoint complains: {:?}", ingest.complaints());
    Ok(())
}

/// Whatever the endpoint does, at last it has every record; twice only what it took without saying so.
pub(super) fn endpoint_trouble(cx: &mut Context) -> Result<()> {
    let (mut lab, mut ingest, ..) = start(cx)?;
    lab.expect_warning("Flow logs cannot be uploaded");
    lab.expect_warning("The server calls flow logs invalid");
    let mut flows = 0;
    for (name, answer, status, most) in [
        ("413", Answer::AtMost(1), 413, 1),
        ("429", Answer::Later(1), 429, 1),
        ("500", Answer::Status(500), 500, 1),
        ("302", Answer::Elsewhere, 302, 1),
        ("reset before", Answer::ResetBefore, 0, 1),
        ("422", Answer::SomeInvalid, 422, 1),
        // The last: these come twice from now on.
        ("reset after", Answer::ResetAfter, 0, 2),
    ] {
        // While it is away records gather, so that a batch has several.
        ingest.stop();
        for _ in 0..3 {
            fetch(cx, "/")?;
        }
        flows += 3;
        // FIN in both directions is noticed within a second.
        std::thread::sleep(2 * SECOND);
        let before = ingest.answers().len();
        ingest.tell([answer]);
        ingest.restart(&cx.topology.portal.namespace)?;
        ingest
            .wait("all records", UPLOADED, |records| {
                records.values().filter(|record| record.closed > 0).count() == flows
            })
            .context(name)?;
        let answers = ingest.answers();
        ensure!(answers[before..].contains(&status), "{name}: it answered {:?}", &answers[before..]);
        once(&ingest, flows, most).context(name)?;
    }
    lab.finish()
}

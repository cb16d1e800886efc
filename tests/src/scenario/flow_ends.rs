//! How flows end, whom their records name, and what is printed of them and of what was denied.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Context,
    dns::{Nameserver, ResolvConf},
    flow_logs::{Endpoint, UPLOADED, closed},
    lab::{Lab, Options, curl},
    names::{PROXIES, assign, names},
    transfers::iperf3,
};
use crate::{
    net::{
        process::wait_for,
        topology::{LAN_HOST, PORTAL},
    },
    standins::portal::{Filter, Resource},
};

const SECOND: Duration = Duration::from_secs(1);
/// What nginx says at `/`.
const HELLO: &str = "hello from the LAN\n";
const NAME: &str = "web.lan.test";

/// Are these the values of these members?
fn has(record: &Value, expect: Value) -> Result<()> {
    for (name, value) in expect.as_object().into_iter().flatten() {
        ensure!(record[name] == *value, "{name} is not {value} in {record}");
    }
    Ok(())
}

/// Connections that were aborted, by either side, and a stream of datagrams: ports and payload are those that the programs saw.
/// What is denied is told too. All of it is printed, without the tokens.
pub(super) fn resets_and_datagrams(cx: &mut Context) -> Result<()> {
    let permitted = Resource::cidr("some ports", &format!("{}/32", LAN_HOST.0))
        .with_filters([Filter::tcp(80, 5201), Filter::udp(5201, 5201)]);
    let mut options = Options { resources: vec![permitted.clone()], ..Options::default() };
    options.launch.environment.push(("FIREZONE_FLOW_LOGS", "true".to_owned()));
    let endpoint = Endpoint::new(cx, &mut options)?;
    let mut lab = Lab::start(cx, &options)?;
    let ingest = endpoint.start(cx, &lab)?;
    lab.connect(0, std::slice::from_ref(&permitted))?;
    let client = &cx.topology.clients[0].namespace;
    let at = |port| SocketAddr::new(LAN_HOST.0.into(), port);

    let (port, sent, got) = client.run(|| aborted(at(80)))?;
    let record = closed(&ingest, "tcp", port).context("the client's reset")?;
    let target = |port: u16| serde_json::json!({ "inner_dst_ip": LAN_HOST.0, "inner_dst_port": port });
    has(&record, target(80))?;
    has(&record, serde_json::json!({ "tx_bytes": sent, "rx_bytes": got }))?;

    // Port 81 is permitted, and nobody listens: SYN, RST.
    let port = refused(cx, at(81))?;
    let record = closed(&ingest, "tcp", port).context("the server's reset")?;
    has(&record, target(81))?;
    has(&record, serde_json::json!({ "tx_packets": 1, "rx_packets": 1, "tx_bytes": 0, "rx_bytes": 0 }))?;

    // 4 bytes in each direction come before the stream.
    const HELLO_BYTES: u64 = 4;
    let report = iperf3(client, at(0).ip(), &["-u", "-b", "10M", "-l", "1000", "-t", "1", "-w", "2M"])?;
    let port = report["start"]["connected"][0]["local_port"].as_u64().context("iperf3 told no port")?;
    let sum = &report["end"]["sum"];
    let [packets, lost] = ["packets", "lost_packets"].map(|name| sum[name].as_u64());
    let (sent, lost) = (packets.context("iperf3 told no packets")?, lost.context("nor losses")?);
    refused_by_filter(cx, at(9000))?;
    // Whoever loses access has no open flows any more.
    lab.portal.reject_access(lab.client_id(0)?, permitted.id)?;
    lab.clients[0].wait_goodbye(5 * SECOND)?;
    let record = closed(&ingest, "udp", port).context("the datagrams")?;
    has(&record, target(5201))?;
    has(&record, serde_json::json!({ "rx_bytes": HELLO_BYTES, "rx_packets": 1 }))?;
    let counted = record["tx_bytes"].as_u64().unwrap_or_default();
    // Those that were lost may have been lost on either side of the gateway.
    let bounds = ((sent - lost) * 1000 + HELLO_BYTES)..=(sent * 1000 + HELLO_BYTES);
    ensure!(bounds.contains(&counted), "{counted} bytes are not within {bounds:?}: {sum}");

    let log = lab.gateway.log();
    for (line, parts) in [
        ("TCP flow started", vec!["inner_dst_port=81", "role=\"responder\""]),
        ("TCP flow completed", vec!["inner_dst_port=80", "resource_name=\"some ports\"", "tx_bytes="]),
        ("UDP flow completed", vec!["inner_dst_port=5201", "initiator_actor_name=\"Stand-in Actor\""]),
        ("Packet denied", vec!["inner_dst_port=9000", "protocol=6"]),
    ] {
        let fits = |text: &&str| text.contains(line) && parts.iter().all(|part| text.contains(part));
        ensure!(log.lines().any(|text| fits(&text)), "no {line:?} with {parts:?} is printed");
    }
    for secret in lab.portal.secrets() {
        ensure!(!log.contains(&secret.value), "the log has a secret: {}", secret.kind);
    }
    ensure!(ingest.complaints().is_empty(), "the endpoint complains: {:?}", ingest.complaints());
    lab.finish()
}

/// A request over a connection that is kept, and is then reset. Its port, the bytes sent and those that came.
fn aborted(server: SocketAddr) -> Result<(u16, usize, usize)> {
    let mut stream = TcpStream::connect_timeout(&server, 5 * SECOND)?;
    stream.set_read_timeout(Some(5 * SECOND))?;
    let request = "GET / HTTP/1.1\r\nHost: lan\r\n\r\n";
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    while !answer.ends_with(HELLO.as_bytes()) {
        let mut some = [0; 1000];
        let length = stream.read(&mut some)?;
        ensure!(length > 0, "the server closed");
        answer.extend_from_slice(&some[..length]);
    }
    let port = stream.local_addr()?.port();
    // Closed with a linger of 0 it says RST.
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok((port, request.len(), answer.len()))
}

/// The port of a connection that the server refuses.
fn refused(cx: &Context, server: SocketAddr) -> Result<u16> {
    const PORT: u16 = 40_081;
    let url = format!("http://{server}/");
    let said = curl(&cx.topology.clients[0].namespace, &["--local-port", &PORT.to_string(), &url])?;
    ensure!(said.status.code() == Some(7), "curl to a closed port: {} {}", said.status, said.stderr);
    Ok(PORT)
}

fn refused_by_filter(cx: &Context, server: SocketAddr) -> Result<()> {
    let said = curl(&cx.topology.clients[0].namespace, &[&format!("http://{server}/")])?;
    ensure!(!said.status.success(), "port {} answers", server.port());
    Ok(())
}

/// A flow to a name: the record has the name, the address that it stands for, and the bytes that curl saw.
pub(super) fn of_a_name(cx: &mut Context) -> Result<()> {
    let host = format!("{NAME},{},{}", LAN_HOST.0, LAN_HOST.1);
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &[host])?;
    let launch = ResolvConf::new(cx, &[PORTAL])?.launch(cx)?;
    let mut options = Options { resources: vec![names()], launch, ..Options::default() };
    let endpoint = Endpoint::new(cx, &mut options)?;
    let mut lab = Lab::start(cx, &options)?;
    let ingest = endpoint.start(cx, &lab)?;
    lab.connect(0, &[names()])?;
    let status = assign(&mut lab, &names(), NAME)?;
    ensure!(status == "Active", "{NAME} is {status}");
    let client = &cx.topology.clients[0].namespace;
    for (proxy, real) in [(PROXIES[0], LAN_HOST.0.to_string()), (PROXIES[2], LAN_HOST.1.to_string())] {
        let host = if proxy.contains(':') { format!("[{proxy}]") } else { proxy.to_owned() };
        let say = "%{size_request} %{size_header} %{size_download}";
        let said =
            curl(client, &["-f", "-o", "/dev/null", "-w", say, &format!("http://{host}/")])?.success()?;
        let numbers = said.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let [sent, header, body] = numbers[..] else { anyhow::bail!("curl said {said:?}") };
        let records = ingest.wait(&format!("the record of a flow to {real}"), UPLOADED, |records| {
            records.values().any(|record| record.closed > 0 && record.payload["inner_dst_ip"] == *real)
        })?;
        let record = records.values().find(|record| record.payload["inner_dst_ip"] == *real);
        let record = &record.context("what was just waited for")?.payload;
        has(record, serde_json::json!({ "domain": NAME, "inner_dst_port": 80, "protocol": "tcp" }))?;
        has(record, serde_json::json!({ "tx_bytes": sent, "rx_bytes": header + body }))?;
    }
    ensure!(ingest.complaints().is_empty(), "the endpoint complains: {:?}", ingest.complaints());
    ensure!(ingest.records().len() == 2, "two flows are not these: {:?}", ingest.records());
    lab.finish()
}

/// Where the portal wants no uploads, flows are printed if the operator wants it, and nothing is on the disk.
pub(super) fn not_uploaded(cx: &mut Context) -> Result<()> {
    let mut options = Options { resources: vec![super::lab::lan4()], ..Options::default() };
    options.launch.environment.push(("FIREZONE_FLOW_LOGS", "true".to_owned()));
    let endpoint = Endpoint::new(cx, &mut options)?;
    options.flow_logs.upload_interval_secs = 0;
    let mut lab = Lab::start(cx, &options)?;
    let ingest = endpoint.start(cx, &lab)?;
    lab.connect(0, &options.resources)?;
    let client = &cx.topology.clients[0].namespace;
    let fetch = || curl(client, &["-f", &format!("http://{}/", LAN_HOST.0)])?.success();
    let printed = |lab: &Lab| lab.gateway.log().matches("TCP flow completed").count();
    ensure!(fetch()? == HELLO, "another page");
    wait_for("a flow to be printed", 5 * SECOND, || Ok((printed(&lab) == 1).then_some(())))?;
    ensure!(!endpoint.spool.exists(), "{} exists", endpoint.spool.display());

    // Uploads begin, yet this client's token still says that its flows are not for upload.
    lab.portal.configure(|config| config.flow_logs.upload_interval_secs = 1);
    lab.portal.push_init();
    wait_for("upload.json", 5 * SECOND, || Ok(endpoint.spool.join("upload.json").exists().then_some(())))?;
    ensure!(fetch()? == HELLO, "another page");
    wait_for("the next to be printed", 5 * SECOND, || Ok((printed(&lab) == 2).then_some(())))?;
    ensure!(files_of_records(&endpoint.spool)?.is_empty(), "{:?}", files_of_records(&endpoint.spool)?);

    // They end again, and with them the memory of where to.
    lab.portal.configure(|config| config.flow_logs.upload_interval_secs = 0);
    lab.portal.push_init();
    wait_for("upload.json to go", 5 * SECOND, || {
        Ok((!endpoint.spool.join("upload.json").exists()).then_some(()))
    })?;
    ensure!(ingest.answers().is_empty(), "somebody asked the endpoint: {:?}", ingest.answers());
    lab.finish()
}

/// All halves of records in a spool.
pub(super) fn files_of_records(spool: &std::path::Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let Ok(folders) = std::fs::read_dir(spool.join("responder")) else { return Ok(files) };
    for folder in folders {
        // One may be removed at this moment.
        let Ok(entries) = std::fs::read_dir(folder?.path()) else { continue };
        let paths = entries.flatten().map(|entry| entry.path());
        files.extend(paths.filter(|path| path.to_string_lossy().ends_with(".json")));
    }
    Ok(files)
}

//! What waits on the disk: over an outage and a restart, and beside what somebody else put there.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Context,
    flow_ends::files_of_records,
    flow_logs::{Endpoint, closed},
    lab::{Download, Lab, Options, PATIENCE, curl, lan4, launch},
};
use crate::{
    net::{NetNs, process::wait_for, topology::LAN_HOST},
    standins::{
        ingest::Ingest,
        portal::{Resource, Role},
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// The endpoint is away. Flows come and end, the gateway is told to end and starts again, is killed and starts again. When the
/// endpoint is back it gets every record, each once, and nothing waits any more.
pub(super) fn outage(cx: &mut Context) -> Result<()> {
    let mut options = Options { resources: vec![lan4()], ..Options::default() };
    let endpoint = Endpoint::new(cx, &mut options)?;
    let mut lab = Lab::start(cx, &options)?;
    lab.expect_warning("Flow logs cannot be uploaded");
    lab.connect(0, &[lan4()])?;
    let client = &cx.topology.clients[0].namespace;
    let mut ports = 42_000..;
    let mut fetched = Vec::new();
    let mut fetch = |spool: &Path| -> Result<()> {
        for port in ports.by_ref().take(5) {
            get(client, port)?;
            fetched.push(port);
        }
        // Both halves of each are on the disk: what is there when the gateway goes is not lost, however it goes.
        let expect = 2 * fetched.len();
        wait_for(&format!("{expect} files"), 10 * SECOND, || {
            Ok((files_of_records(spool)?.len() == expect).then_some(()))
        })
    };
    fetch(&endpoint.spool).context("before")?;
    lab.terminate(10 * SECOND)?;
    again(cx, &mut lab, &options, "gateway-again")?;
    fetch(&endpoint.spool).context("after the restart")?;
    lab.gateway.signal(Signal::KILL)?;
    lab.gateway.wait(2 * SECOND)?;
    wait_for("the portal to see it go", 5 * SECOND, || {
        Ok(lab.portal.online(Role::Gateway).is_empty().then_some(()))
    })?;
    again(cx, &mut lab, &options, "gateway-after-kill")?;
    fetch(&endpoint.spool).context("after the kill")?;

    let ingest = endpoint.start(cx, &lab)?;
    // By now it tries again every few seconds.
    let records = ingest.wait("all records", 60 * SECOND, |records| {
        records.values().filter(|record| record.closed > 0).count() == fetched.len()
    })?;
    let sources: BTreeSet<u64> =
        records.values().filter_map(|record| record.payload["inner_src_port"].as_u64()).collect();
    ensure!(sources == fetched.iter().map(|port| u64::from(*port)).collect(), "ports {sources:?}");
    for (key, record) in &records {
        // Where both halves wait only the closed one is sent.
        ensure!((record.opened, record.closed) == (0, 1), "{key:?} came as {record:?}");
    }
    wait_for("an empty spool", 5 * SECOND, || {
        Ok(files_of_records(&endpoint.spool)?.is_empty().then_some(()))
    })?;
    ensure!(ingest.complaints().is_empty(), "the endpoint complains: {:?}", ingest.complaints());
    ensure!(ingest.records().len() == fetched.len(), "others came later: {:?}", ingest.records());
    lab.finish()
}

/// Starts the daemon once more, and the client comes back to it.
fn again(cx: &Context, lab: &mut Lab, options: &Options, log: &str) -> Result<()> {
    lab.clients[0].forget_events();
    let mark = lab.portal.mark();
    let (token, url) = (lab.gateway_token.clone(), lab.portal.url());
    lab.gateway = launch(cx, log, &token, &url, options.rust_log, &options.launch)?;
    lab.portal.wait_since(mark, PATIENCE, |entry| entry.to_gateway("init"))?;
    lab.connect(0, &options.resources)
}

fn get(client: &NetNs, port: u16) -> Result<()> {
    let url = format!("http://{}/", LAN_HOST.0);
    curl(client, &["-f", "--local-port", &port.to_string(), &url])?.success()?;
    Ok(())
}

/// Claims that lead elsewhere, if they are taken for names of folders.
fn hostile_claims(elsewhere: &Path) -> Vec<(&'static str, Value)> {
    let uuid = "00000000-0000-4000-8000-000000000001";
    [
        "../../x".to_owned(),
        "..".to_owned(),
        elsewhere.display().to_string(),
        format!("{uuid}\0"),
        format!("../{}", &uuid[3..]),
        uuid[..35].to_owned(),
        uuid.replace('-', ""),
        format!("{{{uuid}}}"),
        uuid.to_owned() + "/../../../x",
        "\0".repeat(36),
        "/".repeat(36),
        "x".repeat(20_000),
        String::new(),
    ]
    .into_iter()
    .map(|id| ("policy_authorization_id", json!(id)))
    .chain([
        ("policy_authorization_id", json!(null)),
        ("policy_authorization_id", json!({ "..": 1 })),
        ("role", json!("../../x")),
        ("role", json!("initiator")),
        ("role", json!("responder/../../../x")),
        ("role", json!("responder\0")),
        ("role", json!(7)),
    ])
    .collect()
}

/// Tokens and files that nobody should make: each is worth one warning at most, nothing is written outside of the spool,
/// traffic does not notice, and records of others are uploaded.
pub(super) fn hostile(cx: &mut Context) -> Result<()> {
    let elsewhere = cx.logs.file("state/elsewhere");
    let claims = hostile_claims(&elsewhere);
    let resource = |index: usize| Resource::cidr(&format!("hostile {index}"), &format!("10.77.{index}.0/24"));
    let hostile: Vec<Resource> = (0..claims.len()).map(resource).collect();
    let resources = [vec![lan4()], hostile.clone()].concat();
    let mut options = Options { resources, ..Options::default() };
    let endpoint = Endpoint::new(cx, &mut options)?;
    let mut lab = Lab::start(cx, &options)?;
    lab.expect_warning("its token cannot be used");
    let ingest = endpoint.start(cx, &lab)?;
    lab.connect(0, &[lan4()])?;
    let client = &cx.topology.clients[0].namespace;
    let slow = Download::start(cx, client, "slow", &format!("http://{}/slow", LAN_HOST.0))?;
    slow.wait_growth(5 * SECOND)?;

    for (resource, (name, value)) in hostile.iter().zip(&claims) {
        lab.portal.configure(|config| {
            config.ingest_claims.clear();
            config.ingest_claims.insert((*name).to_owned(), value.clone());
        });
        lab.connect(0, std::slice::from_ref(resource)).with_context(|| format!("{name} {value}"))?;
    }
    let warnings = lab.gateway.log().matches("its token cannot be used").count();
    ensure!(warnings == claims.len(), "{warnings} warnings of {} tokens", claims.len());
    slow.wait_growth(5 * SECOND).context("after hostile tokens")?;
    only_ours(cx, &endpoint.spool)?;

    let victim = cx.logs.file("victim");
    fs::write(&victim, "left alone")?;
    let junk = put_junk(&endpoint.spool, &victim)?;
    for port in 43_000_u16..43_003 {
        get(client, port)?;
        closed(&ingest, "tcp", port).context("beside files that are none of ours")?;
    }
    slow.wait_growth(5 * SECOND).context("after hostile files")?;
    for path in junk {
        wait_for(&format!("{} to be removed", path.display()), 5 * SECOND, || {
            Ok(fs::symlink_metadata(&path).is_err().then_some(()))
        })?;
    }
    ensure!(fs::read_to_string(&victim)? == "left alone", "{} was changed", victim.display());
    only_ours(cx, &endpoint.spool)?;
    no_complaint(&ingest)?;
    drop(slow);
    lab.finish()
}

fn no_complaint(ingest: &Ingest) -> Result<()> {
    ensure!(ingest.complaints().is_empty(), "the endpoint complains: {:?}", ingest.complaints());
    Ok(())
}

/// From the folder that was the daemon's to make down to the authorizations there is nothing but what must be.
fn only_ours(cx: &Context, spool: &Path) -> Result<()> {
    let state = cx.logs.file("state");
    for (folder, expect) in [
        (state.clone(), vec!["gateway"]),
        (state.join("gateway"), vec!["flow_logs"]),
        (spool.to_owned(), vec!["responder", "upload.json"]),
    ] {
        let names = names_in(&folder)?;
        ensure!(names.iter().eq(&expect), "{} has {names:?}", folder.display());
    }
    for name in names_in(&spool.join("responder"))? {
        let id = Uuid::try_parse(&name).with_context(|| format!("a folder {name:?}"))?;
        ensure!(id.to_string() == name, "a folder {name:?}");
    }
    Ok(())
}

fn names_in(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Files that look like records and are none, in every folder with a token, and folders that have none that is right. Those
/// that will be removed.
fn put_junk(spool: &Path, victim: &Path) -> Result<Vec<PathBuf>> {
    let mut junk = Vec::new();
    for name in names_in(&spool.join("responder"))? {
        let folder = spool.join("responder").join(name);
        let mut place = |name: &str| {
            let path = folder.join(name);
            junk.push(path.clone());
            path
        };
        let whole = r#"{"checksum":1,"payload":{"protocol":"tcp"}}"#;
        fs::write(place("0000000001-0000000000000001.end.json"), "")?;
        fs::write(place("0000000001-0000000000000002.end.json"), whole)?;
        fs::write(place("0000000001-0000000000000003.start.json"), &whole[..20])?;
        fs::write(place("0000000001-0000000000000004.end.json"), [0xff; 1000])?;
        fs::write(place("0000000001-0000000000000005.end.json"), "[".repeat(60_000))?;
        fs::write(place("0000000001-0000000000000006.start.json"), vec![b'{'; 20_000_000])?;
        fs::create_dir(place("0000000001-0000000000000007.end.json"))?;
        symlink(victim, place("0000000001-0000000000000008.end.json"))?;
        // Whoever opens it waits for a writer.
        rustix::fs::mknodat(
            rustix::fs::CWD,
            place("0000000001-0000000000000009.end.json"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )?;
        fs::write(place("..end.json"), "null")?;
    }
    let stranger = spool.join("responder").join(Uuid::new_v4().to_string());
    fs::create_dir(&stranger)?;
    fs::write(stranger.join("token"), vec![b'x'; 1_000_000])?;
    fs::write(stranger.join("0000000001-0000000000000001.end.json"), "{}")?;
    Ok(junk)
}

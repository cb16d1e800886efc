//! What goes wrong while the fast path carries: it comes back, or the sockets carry, and the log says why.
//!
//! The gateway takes the fast path natively on an uplink like a NIC's, whatever mode the list runs in. That it carried, the
//! kernel's counters say ([`Proof`]).

use std::{
    collections::BTreeMap,
    net::UdpSocket,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use gateway_common::{DropReason, maps};
use rustix::process::Signal;

use super::{
    Context, Skip,
    fast_path::{self, Proof},
    lab::{Download, Lab, Launch, Options, curl, http_both, lan4, lan6, launch},
    relays::reconnect,
    start::{can_run, in_mount_namespace, words},
};
use crate::net::{
    NetNs,
    process::{Process, Spawn, run, wait_for},
    topology::LAN_HOST,
};

const SECOND: Duration = Duration::from_secs(1);
/// The gateway's uplink, and the router's end of it.
const UPLINK: &str = "eth0";
const ROUTER_END: &str = "gw";
/// What the gateway says when it has taken the uplink.
const TAKEN: &str = "Fast path on eth0: native";
/// What it warns of when it cannot.
const NOT_TAKEN: &str = "Fast path: off, though native is asked for";
/// Frames of the 500 kB after which a transfer has grown: at least half of them, should the receiver's host put some together.
const FRAMES: u64 = 200;

/// SIGKILL in the middle of a transfer: the kernel takes the program off, and the next gateway puts fresh maps in place of
/// the stale ones. The client is served again as soon as after a restart without a fast path. At its end nothing is pinned.
pub(super) fn killed(cx: &mut Context) -> Result<()> {
    fast_path::native(cx)?;
    let bpffs = Bpffs::mount(cx)?;
    let mut lab = start(cx, &Options { launch: bpffs.launch(), ..Options::default() })?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    carries(&Proof::of(&cx.topology), &transfer)?;
    let stale = bpffs.pinned(cx)?;
    ensure!(stale.len() == maps::ALL.len(), "pinned are {stale:?}");

    let off = bpffs.launch().with("FIREZONE_FAST_PATH", "off");
    let without = kill_and_start(cx, &mut lab, &transfer, "gateway-off", &off)?;
    ensure!(bpffs.pinned(cx)? == stale, "a gateway without a fast path pins nothing, and removes nothing");
    let with = kill_and_start(cx, &mut lab, &transfer, "gateway-again", &bpffs.launch())?;
    println!("      after SIGKILL the transfer goes on after {:.1} s, with a fast path", with.as_secs_f64());
    println!("      and after {:.1} s without", without.as_secs_f64());
    // A client may need one more attempt, and a sender's time-out has doubled.
    ensure!(with < without + 10 * SECOND, "{with:?} with a fast path, {without:?} without");
    wait_taken(&lab, 1)?;
    carries(&Proof::of(&cx.topology), &transfer)?;
    let fresh = bpffs.pinned(cx)?;
    for spec in maps::ALL {
        let (old, new) = (stale.get(spec.name), fresh.get(spec.name));
        ensure!(new.is_some() && new != old, "{}: {old:?} was not replaced: {new:?}", spec.name);
    }
    lab.finish()?;
    let folder = bpffs.seen_from_here();
    ensure!(!folder.join(PINS).exists(), "after SIGTERM there is {:?}", bpffs.pinned(cx)?);
    ensure!(Proof::of(&cx.topology).program()?.is_none(), "a program is left on {UPLINK}");
    Ok(())
}

/// How long a transfer stands still when the gateway is killed and another one started.
fn kill_and_start(
    cx: &Context,
    lab: &mut Lab,
    transfer: &Download,
    name: &str,
    how: &Launch,
) -> Result<Duration> {
    lab.gateway.signal(Signal::KILL)?;
    let (killed, mark) = (Instant::now(), lab.portal.mark());
    lab.gateway.wait(2 * SECOND)?;
    let proof = Proof::of(&cx.topology);
    wait_for("the kernel to take the program off", 2 * SECOND, || {
        Ok(proof.program()?.is_none().then_some(()))
    })?;
    lab.gateway = launch(cx, name, &lab.gateway_token, &lab.portal.url(), "info", how)?;
    lab.portal.wait_since(mark, 10 * SECOND, |entry| entry.to_gateway("init"))?;
    reconnect(lab, 0, &[lan4(), lan6()], 30 * SECOND)?;
    transfer.wait_growth(20 * SECOND)?;
    Ok(killed.elapsed())
}

/// The other end of the uplink goes down and comes up: the gateway leaves and takes it again.
pub(super) fn link_down(cx: &mut Context) -> Result<()> {
    /// What a link does so soon after it was taken is the driver's doing, the gateway thinks.
    const SETTLE: Duration = Duration::from_secs(5);
    fast_path::native(cx)?;
    let mut lab = start(cx, &Options::default())?;
    let taken = Instant::now();
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    let proof = Proof::of(&cx.topology);
    carries(&proof, &transfer)?;
    std::thread::sleep((SETTLE + SECOND / 5).saturating_sub(taken.elapsed()));
    link(&cx.topology.router, ROUTER_END, "down")?;
    let down = Instant::now();
    let left = lab.gateway.wait_log("The fast path leaves eth0: its link is down", 1, 10 * SECOND);
    link(&cx.topology.router, ROUTER_END, "up")?;
    left?;
    let up = Instant::now();
    transfer.wait_growth(15 * SECOND).context("after the link came up")?;
    println!(
        "      down for {:.1} s, and the transfer goes on {:.1} s later",
        (up - down).as_secs_f64(),
        up.elapsed().as_secs_f64()
    );
    wait_taken(&lab, 2)?;
    carries(&proof, &transfer)?;
    lab.finish()
}

/// Somebody else's XDP program was there first: it stays, the log says so, and the sockets carry. When it goes, the gateway
/// takes the uplink.
pub(super) fn other_program(cx: &mut Context) -> Result<()> {
    fast_path::native(cx)?;
    let file = cx.logs.file("other.o");
    std::fs::write(&file, pass_everything())?;
    let (file, proof) = (file.display().to_string(), Proof::of(&cx.topology));
    let uplink = &cx.topology.gateway.namespace;
    let attach = ["ip", "link", "set", "dev", UPLINK, "xdp", "obj", &file, "sec", "xdp"];
    run(uplink, 5 * SECOND, &attach)?
        .success()
        .map_err(|e| Skip(format!("no other XDP program can be attached: {e:#}")))?;
    let other = proof.program()?.context("it is attached")?;
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.expect_warning(NOT_TAKEN);
    need_programs(&lab)?;
    lab.gateway.wait_log(NOT_TAKEN, 1, 10 * SECOND)?;
    let why = format!("another XDP program (id {other}) is attached to {UPLINK}");
    ensure!(lab.gateway.log().contains(&why), "the log does not say: {why}");
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    http_both(client)?;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    transfer.wait_growth(3 * SECOND).context("by the sockets")?;
    ensure!(proof.program()? == Some(other), "{:?} is attached instead", proof.program()?);
    run(uplink, 5 * SECOND, &["ip", "link", "set", "dev", UPLINK, "xdp", "off"])?.success()?;
    wait_taken(&lab, 1).context("when it has gone")?;
    carries(&proof, &transfer)?;
    lab.finish()
}

/// Jumbo frames come while a transfer runs: such packets fit no frame, so the sockets carry it on. They go, and the fast path
/// carries again.
pub(super) fn jumbo_frames(cx: &mut Context) -> Result<()> {
    fast_path::native(cx)?;
    let mut lab = start(cx, &Options::default())?;
    lab.expect_warning(NOT_TAKEN);
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    let proof = Proof::of(&cx.topology);
    carries(&proof, &transfer)?;
    let uplink = &cx.topology.gateway.namespace;
    uplink.ip_batch(&[format!("link set {UPLINK} mtu 9000")])?;
    lab.gateway.wait_log("packets with an MTU of 9000 bytes fit no frame", 1, 10 * SECOND)?;
    lab.gateway.wait_log(NOT_TAKEN, 1, SECOND)?;
    ensure!(proof.program()?.is_none(), "the program is still there");
    // With a program on the gateway's end, a veth would not take it.
    cx.topology.router.ip_batch(&[format!("link set {ROUTER_END} mtu 9000")])?;
    transfer.wait_growth(3 * SECOND).context("with jumbo frames")?;
    http_both(client)?;
    cx.topology.router.ip_batch(&[format!("link set {ROUTER_END} mtu 1500")])?;
    uplink.ip_batch(&[format!("link set {UPLINK} mtu 1500")])?;
    wait_taken(&lab, 2)?;
    carries(&proof, &transfer)?;
    lab.finish()
}

/// Without the right to load programs: one sentence, and the sockets carry.
pub(super) fn no_rights(cx: &mut Context) -> Result<()> {
    const WHY: &str = "Fast path: off: no BPF rights: grant CAP_BPF";
    // Nothing is there to prove.
    cx.variation.fast_path.clear();
    let wrapper =
        words("setpriv --bounding-set=-all,+net_admin --inh-caps=-all,+net_admin --pdeathsig=KILL --");
    let launch = Launch { wrapper, ..Launch::default() }.with("FIREZONE_FAST_PATH", "native");
    let mut lab = Lab::start(cx, &Options { launch, ..Options::default() })?;
    lab.expect_warning(WHY);
    need_programs(&lab)?;
    let log = lab.gateway.log();
    let said = log.lines().filter(|line| line.contains("Fast path") && !line.contains("DEBUG")).count();
    ensure!(log.contains(WHY) && said == 1, "not one sentence with {WHY:?}: {log}");
    lab.connect(0, &[lan4(), lan6()])?;
    http_both(&cx.topology.clients[0].namespace)?;
    ensure!(Proof::of(&cx.topology).program()?.is_none(), "a program is attached to {UPLINK}");
    lab.finish()
}

/// The gateway stands still for a second under a stream of datagrams, so that its rings run full: the kernel drops, says why,
/// and afterwards all is as before.
pub(super) fn starved(cx: &mut Context) -> Result<()> {
    /// A second and its pace: more than the rings hold (1024 places each), for each of two workers.
    const STREAM: (Duration, u32) = (SECOND, 8_000);
    fast_path::native(cx)?;
    let mut lab = start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let proof = Proof::of(&cx.topology);
    let transfer = Download::start(cx, client, "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    carries(&proof, &transfer)?;
    lab.gateway.signal(Signal::STOP)?;
    let sent = stream(client, STREAM.0, STREAM.1);
    lab.gateway.signal(Signal::CONT)?;
    let sent = sent?;
    transfer.wait_growth(15 * SECOND).context("after it stood still")?;
    let mut lost = (0, 0);
    wait_for("drops of AF_XDP in the metrics", 5 * SECOND, || {
        // They are asked for once a second.
        std::thread::sleep(SECOND / 4);
        lost = (metric(cx, DropReason::XskRingFull)?, metric(cx, DropReason::XskStarved)?);
        Ok((lost.0 + lost.1 > 0).then_some(()))
    })?;
    println!("      of {sent} datagrams {} found the ring full, {} no frame to be put into", lost.0, lost.1);
    carries(&proof, &transfer)?;
    http_both(client)?;
    lab.finish()
}

/// The kernel's maps have room for two clients, and three come: the sockets carry for all, and log and metrics say why.
pub(super) fn full_maps(cx: &mut Context) -> Result<()> {
    const WHY: &str = "a map of the kernel's is full";
    fast_path::native(cx)?;
    let launch = Launch::default().with("FIREZONE_FAST_PATH_CLIENTS", "2");
    let mut lab = start(cx, &Options { launch, ..Options::default() })?;
    lab.expect_warning(WHY);
    let clients: Vec<&NetNs> = cx.topology.clients.iter().map(|node| &node.namespace).collect();
    ensure!(clients.len() == 3, "two find room and one does not");
    lab.connect(0, &[lan4(), lan6()])?;
    let transfer = Download::start(cx, clients[0], "transfer", &format!("http://{}/slow", LAN_HOST.0))?;
    let proof = Proof::of(&cx.topology);
    carries(&proof, &transfer)?;
    for client in 1..clients.len() {
        lab.connect(client, &[lan4(), lan6()])?;
    }
    lab.gateway.wait_log(WHY, 1, SECOND)?;
    clients.iter().try_for_each(|client| http_both(client))?;
    transfer.wait_growth(3 * SECOND).context("by the sockets")?;
    let before = proof.redirected()?;
    transfer.wait_growth(3 * SECOND).context("by the sockets")?;
    ensure!(proof.redirected()? == before, "the fast path is not off");
    let page = curl(&cx.topology.gateway.namespace, &["http://127.0.0.1:8080/metrics"])?.success()?;
    let left_out = page.lines().filter(|line| line.contains("map_entries_left_out_total{"));
    let full: Vec<&str> = left_out.filter(|line| !line.ends_with(" 0")).collect();
    println!("      {}", full.join(", "));
    ensure!(!full.is_empty(), "no map left an entry out: {page}");
    lab.finish()
}

/// Datagrams of 100 bytes from the client to the LAN, at `pace` per second for `time`; how many.
fn stream(client: &NetNs, time: Duration, pace: u32) -> Result<u64> {
    client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let (began, mut sent) = (Instant::now(), 0);
        while began.elapsed() < time {
            let due = u64::try_from(began.elapsed().as_micros()).unwrap_or(0) * u64::from(pace) / 1_000_000;
            while sent < due {
                // A full buffer is no failure of the gateway's, and neither is a port where nobody listens.
                let _lost = socket.send_to(&[7; 100], (LAN_HOST.0, 9));
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(sent)
    })
}

/// Packets that were dropped for this reason, from the daemon's metrics.
fn metric(cx: &Context, reason: DropReason) -> Result<u64> {
    let page = curl(&cx.topology.gateway.namespace, &["http://127.0.0.1:8080/metrics"])?.success()?;
    let label = format!("reason=\"{}\"", reason.label());
    let lines = page.lines().filter(|line| line.contains("dropped_packets_total") && line.contains(&label));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

/// The lab with a gateway that has taken the fast path.
pub(super) fn start(cx: &Context, options: &Options) -> Result<Lab> {
    let lab = Lab::start(cx, options)?;
    need_programs(&lab)?;
    wait_taken(&lab, 1)?;
    Ok(lab)
}

/// Skips where the daemon was built without the kernel programs.
fn need_programs(lab: &Lab) -> Result<()> {
    let without = lab.gateway.log().contains("built without the fast path's kernel programs");
    ensure!(!without, Skip("the daemon was built without the kernel programs".to_owned()));
    Ok(())
}

/// Waits until the gateway has taken the uplink so often.
fn wait_taken(lab: &Lab, times: usize) -> Result<()> {
    lab.gateway.wait_log(TAKEN, times, 10 * SECOND)
}

/// The transfer grows, by the fast path.
pub(super) fn carries(proof: &Proof, transfer: &Download) -> Result<()> {
    // It is switched on a moment after it was taken.
    wait_for("a frame on the fast path", 5 * SECOND, || Ok((proof.redirected()? > 0).then_some(())))?;
    let before = proof.redirected()?;
    // What the client acknowledges, one frame for two of ours at least.
    wait_for("the fast path to carry", 10 * SECOND, || {
        transfer.wait_growth(5 * SECOND)?;
        Ok((proof.redirected()? >= before + FRAMES).then_some(()))
    })
}

fn link(namespace: &NetNs, name: &str, state: &str) -> Result<()> {
    namespace.ip_batch(&[format!("link set {name} {state}")])
}

/// The folder in it where the daemon pins.
const PINS: &str = "firezone-gateway";

/// A bpffs that only this scenario's daemons see: in the mount namespace of a program that sleeps.
struct Bpffs {
    folder: PathBuf,
    holder: Process,
}

impl Bpffs {
    /// Skips where none can be mounted.
    fn mount(cx: &Context) -> Result<Self> {
        let folder = cx.logs.file("bpffs");
        std::fs::create_dir(&folder)?;
        let script = format!("mount -t bpf bpf '{}' && exec \"$@\"", folder.display());
        let mut command = in_mount_namespace(&script);
        can_run(cx, &command)?;
        command.extend(["sleep", "infinity"].map(str::to_owned));
        let what = Spawn { name: "bpffs", command, ..Spawn::default() };
        let holder = Process::spawn(&cx.topology.gateway.namespace, &cx.logs, &what)?;
        let mounts = format!("/proc/{}/mounts", holder.pid());
        let path = folder.display().to_string();
        wait_for("a bpffs", 2 * SECOND, || {
            let mounts = std::fs::read_to_string(&mounts)?;
            Ok(mounts.lines().any(|line| line.contains(&path)).then_some(()))
        })?;
        Ok(Self { folder, holder })
    }

    /// Before a program that shall see it.
    fn wrapper(&self) -> Vec<String> {
        words(&format!("nsenter --mount=/proc/{}/ns/mnt --", self.holder.pid()))
    }

    /// A daemon that sees it, and pins its maps in a folder there.
    fn launch(&self) -> Launch {
        let pins = self.folder.join(PINS).display().to_string();
        Launch { wrapper: self.wrapper(), ..Launch::default() }.with("FIREZONE_BPFFS", pins)
    }

    /// The mount point, from outside of the mount namespace.
    fn seen_from_here(&self) -> PathBuf {
        let path = self.folder.strip_prefix("/").unwrap_or(&self.folder);
        PathBuf::from(format!("/proc/{}/root", self.holder.pid())).join(path)
    }

    /// The maps that are pinned, with the kernel's number of each.
    fn pinned(&self, cx: &Context) -> Result<BTreeMap<String, u64>> {
        let folder = self.seen_from_here().join(PINS);
        let mut pinned = BTreeMap::new();
        for file in std::fs::read_dir(&folder).with_context(|| format!("in {}", folder.display()))? {
            let file = file?.file_name().to_string_lossy().into_owned();
            let path = self.folder.join(PINS).join(&file).display().to_string();
            let wrapper = self.wrapper();
            let show = ["bpftool", "-j", "map", "show", "pinned", &path];
            let command: Vec<&str> = wrapper.iter().map(String::as_str).chain(show).collect();
            let said = run(&cx.topology.gateway.namespace, 5 * SECOND, &command)?.success()?;
            let said: serde_json::Value = serde_json::from_str(&said)?;
            pinned.insert(file, said["id"].as_u64().with_context(|| format!("no id in {said}"))?);
        }
        Ok(pinned)
    }
}

/// An object file with one XDP program, `return XDP_PASS`, as a compiler would make it (ELF64, little-endian, EM_BPF): for
/// this alone nobody shall need one.
fn pass_everything() -> Vec<u8> {
    // r0 = 2; exit (RFC 9669)
    const CODE: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    const NAMES: &[u8] = b"\0xdp\0license\0.symtab\0.strtab\0other\0";
    const HEADER: u64 = 64;
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    // Symbol 1: `other`, a global function, at the start of section 1.
    let symbols = [vec![0; 24], words(&[29 | 0x12 << 32 | 1 << 48, 0, 16])].concat();
    /// Name, type, flags; what is in it; link and info; alignment and size of an entry.
    type Section<'a> = (u32, u32, u64, &'a [u8], u64, [u64; 2]);
    let sections: [Section<'_>; 4] = [
        (1, 1, 6, &CODE, 0, [8, 0]),
        (5, 1, 3, b"GPL\0\0\0\0\0", 0, [1, 0]),
        (13, 2, 0, &symbols, pair(4, 1), [8, 24]),
        (21, 3, 0, NAMES, 0, [1, 0]),
    ];
    let (mut body, mut table) = (Vec::new(), vec![0; 64]);
    for (name, kind, flags, content, links, [alignment, entry]) in sections {
        let at = HEADER + body.len() as u64;
        let size = if name == 5 { 4 } else { content.len() as u64 };
        table.extend(words(&[pair(name, kind), flags, 0, at, size, links, alignment, entry]));
        body.extend_from_slice(content);
        body.resize(body.len().next_multiple_of(8), 0);
    }
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // A relocatable file for machine 247; the table of five sections, names in the fourth.
    file.extend(words(&[
        1 | 247 << 16 | 1 << 32,
        0,
        0,
        HEADER + body.len() as u64,
        64 << 32,
        64 << 16 | 5 << 32 | 4 << 48,
    ]));
    file.extend(body);
    file.extend(table);
    file
}

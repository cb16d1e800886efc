//! What the daemon sets up on its machine so that clients get through, beside the firewalls of others; and what becomes of it.

use std::{net::SocketAddrV6, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    Context, Skip,
    lab::{Lab, Launch, Options, PATIENCE, http_both, lan4, lan6, ping, ping_both, start_gateway},
    rest,
    start::{can_run, in_mount_namespace},
    trouble::is_one_sentence,
};
use crate::net::{
    process::{Outcome, run, wait_for},
    topology::LAN_HOST,
};

const SECOND: Duration = Duration::from_secs(1);

/// How long the daemon may take to notice that the firewall has changed.
const NOTICED: Duration = Duration::from_secs(20);

/// Rulesets of others.
const DOCKER: &str = include_str!("rulesets/docker.sh");
const FIREWALLD: &str = include_str!("rulesets/firewalld.nft");
const OPERATOR: &str = include_str!("rulesets/operator.nft");

/// What the machine's firewall and forwarding are, without counters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Machine {
    rules: String,
    forwarding: [String; 2],
}

const FORWARDING: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];

impl Machine {
    fn now(cx: &Context) -> Result<Self> {
        let gateway = &cx.topology.gateway.namespace;
        let rules = run(gateway, 5 * SECOND, &["nft", "-s", "list", "ruleset"])?.success()?;
        let read = || -> Result<[String; 2]> {
            let [v4, v6] = FORWARDING.map(std::fs::read_to_string);
            Ok([v4?.trim().to_owned(), v6?.trim().to_owned()])
        };
        Ok(Self { rules, forwarding: gateway.run(read)? })
    }

    fn forwards(&self) -> bool {
        self.forwarding == ["1", "1"]
    }
}

fn table(cx: &Context) -> Result<Outcome> {
    run(&cx.topology.gateway.namespace, 5 * SECOND, &["nft", "list", "table", "inet", "firezone_gateway"])
}

fn cleanup(cx: &Context, arguments: &[&str]) -> Result<Outcome> {
    let gateway = cx.gateway.display().to_string();
    let command: Vec<&str> = [&*gateway, "cleanup"].iter().chain(arguments).copied().collect();
    run(&cx.topology.gateway.namespace, 20 * SECOND, &command)
}

fn shell(cx: &Context, script: &str) -> Result<String> {
    run(&cx.topology.gateway.namespace, 20 * SECOND, &["sh", "-c", script])?
        .success()
        .context(script.to_owned())
}

/// A daemon that serves client 0.
fn serve(cx: &Context, launch: Launch) -> Result<Lab> {
    let mut lab = Lab::start(cx, &Options { launch, ..Options::default() })?;
    lab.connect(0, &[lan4(), lan6()])?;
    Ok(lab)
}

fn reach(cx: &Context) -> Result<()> {
    let client = &cx.topology.clients[0].namespace;
    ping_both(client)?;
    http_both(client)
}

/// Nothing is prepared. The daemon sets up, another one the same, and at the end of each everything is as before.
pub(super) fn own_setup(cx: &mut Context) -> Result<()> {
    let before = Machine::now(cx)?;
    ensure!(before.rules.is_empty() && before.forwarding == ["0", "0"], "a bare machine: {before:?}");
    let mut lab = serve(cx, Launch::default())?;
    reach(cx)?;
    let while_it_runs = Machine::now(cx)?;
    ensure!(while_it_runs.forwards(), "{while_it_runs:?}");
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)? == before, "it left behind {:?}", Machine::now(cx)?);

    lab.clients[0].forget_events();
    let gone = lab.portal.mark();
    lab.gateway = start_gateway(cx, "gateway-again", &lab.gateway_token, &lab.portal.url(), "info")?;
    lab.portal.wait_since(gone, 5 * SECOND, |entry| entry.to_gateway("init"))?;
    lab.connect(0, &[lan4(), lan6()])?;
    reach(cx)?;
    ensure!(Machine::now(cx)? == while_it_runs, "the second time it is {:?}", Machine::now(cx)?);
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)? == before, "it left behind {:?}", Machine::now(cx)?);

    // One family is on already: that one stays on.
    cx.topology.gateway.namespace.sysctl(&["net.ipv4.ip_forward=1"])?;
    let mark = lab.portal.mark();
    let mut again = start_gateway(cx, "gateway-third", &lab.gateway_token, &lab.portal.url(), "info")?;
    wait_for("the set-up", 5 * SECOND, || Ok(Machine::now(cx)?.forwards().then_some(())))?;
    let init = |entry: &crate::standins::portal::Entry| entry.to_gateway("init");
    lab.portal.wait_since(mark, 5 * SECOND, init)?;
    rest::terminate(&mut again, 3 * SECOND, 1)?;
    let after = Machine::now(cx)?;
    ensure!(after.rules.is_empty() && after.forwarding == ["1", "0"], "it left behind {after:?}");
    Ok(())
}

/// The operator prepares by README.md's lines; with the flag the daemon touches nothing.
pub(super) fn opt_out(cx: &mut Context) -> Result<()> {
    cx.topology.prepare_gateway()?;
    let before = Machine::now(cx)?;
    ensure!(before.forwards(), "{before:?}");
    let mut lab = serve(cx, Launch::default().without_network_setup())?;
    reach(cx)?;
    ensure!(Machine::now(cx)? == before, "it changed {before:?} to {:?}", Machine::now(cx)?);
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)? == before, "it changed {before:?} to {:?}", Machine::now(cx)?);
    Ok(())
}

/// SIGKILL leaves all of it; `cleanup` removes it, or the next daemon adopts it and removes it when it ends.
pub(super) fn killed(cx: &mut Context) -> Result<()> {
    let before = Machine::now(cx)?;
    let mut lab = serve(cx, Launch::default())?;
    reach(cx)?;
    let said = cleanup(cx, &[])?;
    ensure!(said.status.code() == Some(1), "cleanup beside a daemon that runs: {said:?}");
    is_one_sentence(&said.stderr, &format!("{}", lab.gateway.pid()))?;
    reach(cx).context("after a cleanup that was refused")?;
    let while_it_runs = Machine::now(cx)?;
    lab.gateway.signal(Signal::KILL)?;
    lab.gateway.wait(2 * SECOND)?;
    ensure!(Machine::now(cx)? == while_it_runs, "nobody could clean up: {:?}", Machine::now(cx)?);

    let said = cleanup(cx, &[])?.success()?;
    for what in
        ["inet firezone_gateway", "net.ipv4.ip_forward is 0 again", "conf.all.forwarding is 0 again", "rule"]
    {
        ensure!(said.contains(what), "{what}: {said}");
    }
    ensure!(Machine::now(cx)? == before, "cleanup left {:?}", Machine::now(cx)?);
    let rules = shell(cx, "ip -4 rule list priority 100; ip -6 rule list priority 100")?;
    ensure!(rules.trim().is_empty(), "cleanup left {rules}");
    let said = cleanup(cx, &[])?.success()?;
    ensure!(said == "There was nothing to remove\n", "{said}");

    let run_for_a_while = |name: &str| -> Result<_> {
        let mark = lab.portal.mark();
        let gateway = start_gateway(cx, name, &lab.gateway_token, &lab.portal.url(), "info")?;
        lab.portal.wait_since(mark, 15 * SECOND, |entry| entry.to_gateway("init"))?;
        wait_for("the table", 5 * SECOND, || Ok(table(cx)?.status.success().then_some(())))?;
        wait_for("forwarding", 5 * SECOND, || Ok(Machine::now(cx)?.forwards().then_some(())))?;
        Ok(gateway)
    };
    let mut second = run_for_a_while("second")?;
    second.signal(Signal::KILL)?;
    second.wait(2 * SECOND)?;
    lab.gateway = run_for_a_while("third")?;
    ensure!(Machine::now(cx)? == while_it_runs, "adopted: {:?}", Machine::now(cx)?);
    lab.clients[0].forget_events();
    lab.connect_within(0, &[lan4(), lan6()], 2 * PATIENCE)?;
    wait_for("the LAN", PATIENCE, || Ok(reach(cx).ok()))?;
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)? == before, "the third left {:?}", Machine::now(cx)?);
    Ok(())
}

/// The sentences at WARN about what others drop.
fn warnings(lab: &Lab) -> Vec<String> {
    let log = lab.gateway.log();
    let lines = log.lines().filter(|line| line.split_whitespace().nth(1) == Some("WARN"));
    lines
        .map(|line| line.split_once("network::watch: ").map_or(line, |(_, sentence)| sentence).to_owned())
        .collect()
}

/// Others' rules drop: the daemon says so `count` times and touches nothing of theirs. What it says to type makes clients get
/// through (`cures`, where that program is not here), and after that there is nothing more to say.
fn beside_others(cx: &Context, count: usize, cures: Option<&[&str]>) -> Result<(Lab, Machine)> {
    let before = Machine::now(cx)?;
    let mut lab = serve(cx, Launch::default())?;
    lab.expect_warning(" are dropped by ");
    let said = wait_for("what others drop to be said", 5 * SECOND, || {
        Ok(Some(warnings(&lab)).filter(|said| said.len() >= count))
    })?;
    ensure!(said.len() == count, "{said:?}");
    let client = &cx.topology.clients[0].namespace;
    ensure!(ping(client, LAN_HOST.0.into()).is_err(), "what is said to be dropped gets through: {said:?}");
    let while_it_runs = Machine::now(cx)?;
    ensure!(
        while_it_runs.rules.contains(before.rules.trim_end()),
        "theirs was {before:?} and is {while_it_runs:?}"
    );
    for (index, sentence) in said.iter().enumerate() {
        let (_, line) = sentence.rsplit_once("accept them there: ").context("a line to type")?;
        match cures {
            None => drop(shell(cx, line)?),
            Some(cures) => {
                ensure!(line.starts_with("firewall-cmd "), "{line}");
                shell(cx, cures[index])?;
            }
        }
    }
    reach(cx).context("after what was said was done")?;
    Ok((lab, while_it_runs))
}

/// The end, and what remains: everything of the others. A warning came once.
fn end_beside_others(cx: &Context, mut lab: Lab, count: usize, forwards: bool) -> Result<()> {
    let with_ours = Machine::now(cx)?;
    lab.terminate(8 * SECOND)?;
    let after = Machine::now(cx)?;
    ensure!(!table(cx)?.status.success(), "our table remains");
    let theirs: String = with_ours.rules.split_inclusive("\n}\n").filter(|table| !is_ours(table)).collect();
    ensure!(after.rules == theirs, "of {theirs} remains {after:?}");
    ensure!(after.forwards() == forwards, "{after:?}");
    ensure!(warnings(&lab).len() == count, "{:?}", warnings(&lab));
    Ok(())
}

fn is_ours(table: &str) -> bool {
    table.starts_with("table inet firezone_gateway {")
}

/// Docker's chains, whose policy drops. Docker needs forwarding too, so it stays on.
pub(super) fn docker(cx: &mut Context) -> Result<()> {
    shell(cx, DOCKER)?;
    let (lab, _) = beside_others(cx, 2, None)?;
    let said = warnings(&lab);
    ensure!(
        said[0].ends_with(
            ": iptables -I DOCKER-USER -i tun-firezone -j ACCEPT && iptables -I DOCKER-USER -o tun-firezone -j ACCEPT"
        ),
        "{said:?}"
    );
    ensure!(said[1].contains(": ip6tables -I DOCKER-USER -i tun-firezone"), "{said:?}");
    end_beside_others(cx, lab, 2, true)
}

/// The same by x_tables, which nftables does not list.
pub(super) fn legacy(cx: &mut Context) -> Result<()> {
    let gateway = &cx.topology.gateway.namespace;
    if !run(gateway, 5 * SECOND, &["iptables-legacy", "-P", "FORWARD", "DROP"])?.status.success() {
        return Err(Skip("this kernel has no iptables of the older kind".to_owned()).into());
    }
    let (lab, _) = beside_others(cx, 1, None)?;
    ensure!(
        warnings(&lab)[0].contains("iptables-legacy -I FORWARD -i tun-firezone -j ACCEPT"),
        "{:?}",
        warnings(&lab)
    );
    end_beside_others(cx, lab, 1, false)
}

/// firewalld rejects what comes from a device of no zone. Its program is not here; its rule is.
pub(super) fn firewalld(cx: &mut Context) -> Result<()> {
    cx.topology.gateway.namespace.nft(FIREWALLD)?;
    let trusted =
        "nft insert rule inet firewalld filter_FORWARD_POLICIES iifname tun-firezone goto filter_FWD_trusted";
    let (lab, _) = beside_others(cx, 1, Some(&[trusted]))?;
    end_beside_others(cx, lab, 1, false)
}

/// firewalld comes while the daemon runs: it is noticed, and said with what to do. Then it goes: nothing is left to say.
pub(super) fn comes_later(cx: &mut Context) -> Result<()> {
    let mut lab = serve(cx, Launch::default())?;
    reach(cx)?;
    ensure!(warnings(&lab).is_empty(), "{:?}", warnings(&lab));
    lab.expect_warning(" are dropped by ");
    cx.topology.gateway.namespace.nft(FIREWALLD)?;
    let said = wait_for("the new firewall to be noticed", NOTICED, || {
        Ok(Some(warnings(&lab)).filter(|said| !said.is_empty()))
    })?;
    ensure!(said.len() == 1 && said[0].contains("inet firewalld (chain filter_FORWARD, a rule"), "{said:?}");
    ensure!(said[0].contains("--zone=trusted --add-interface=tun-firezone"), "{said:?}");
    cx.topology.gateway.namespace.nft("delete table inet firewalld\n")?;
    reach(cx).context("after the firewall went")?;
    end_beside_others(cx, lab, 1, false)
}

/// An operator's own table, which drops what it does not name. Later the operator's service begins anew with
/// `flush ruleset`, which takes our table along: it comes back.
pub(super) fn operator(cx: &mut Context) -> Result<()> {
    cx.topology.gateway.namespace.nft(OPERATOR)?;
    let (mut lab, _) = beside_others(cx, 1, None)?;
    let named = shell(cx, "nft -s list table inet mine")?;
    cx.topology.gateway.namespace.nft(&format!("flush ruleset\n{named}"))?;
    ensure!(!table(cx)?.status.success(), "it was flushed");
    wait_for("the table to come back", NOTICED, || Ok(table(cx)?.status.success().then_some(())))?;
    reach(cx).context("after somebody flushed all rules")?;
    ensure!(lab.gateway.poll().is_none(), "the gateway lives");
    end_beside_others(cx, lab, 1, false)
}

/// There is no nft: one sentence, and the daemon serves what can be served.
pub(super) fn without_nft(cx: &mut Context) -> Result<()> {
    let script = "for nft in /usr/sbin/nft /sbin/nft /usr/bin/nft; do \
                  [ -e $nft ] && mount --bind /dev/null $nft; done; exec \"$@\"";
    let sentence = "`nft` is not installed; install the package nftables, or prepare the machine";
    impaired(cx, script, &[sentence])
}

/// Settings cannot be written, as in most containers: the same.
pub(super) fn read_only_settings(cx: &mut Context) -> Result<()> {
    let script = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";
    let v6 = "by `sysctl -w net.ipv6.conf.all.forwarding=1`";
    let v4 = "IPv4 packets of clients are not forwarded: net.ipv4.ip_forward is 0 and cannot be set (Read-only file system";
    impaired(cx, script, &[v6, v4])
}

/// A daemon started by `script` (its `"$@"`) says these sentences at WARN, connects clients who reach nothing, and leaves the
/// machine as it was.
fn impaired(cx: &Context, script: &str, sentences: &[&str]) -> Result<()> {
    let wrapper = in_mount_namespace(script);
    can_run(cx, &wrapper)?;
    let before = Machine::now(cx)?;
    let mut lab = serve(cx, Launch { wrapper, ..Launch::default() })?;
    lab.expect_warning("Resources cannot answer clients");
    lab.expect_warning("are not forwarded");
    let client = &cx.topology.clients[0].namespace;
    ensure!(ping(client, LAN_HOST.0.into()).is_err(), "it works all the same");
    let said = warnings(&lab);
    ensure!(said.len() == sentences.len(), "{said:?}");
    for (said, sentence) in said.iter().zip(sentences) {
        ensure!(said.contains(sentence), "{sentence} is not in {said}");
    }
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)? == before, "it left behind {:?}", Machine::now(cx)?);
    Ok(())
}

/// The machine has an IPv6 default route from a router. Forwarding would make it deaf to routers, and take the route away.
pub(super) fn advertised_route(cx: &mut Context) -> Result<()> {
    let gateway = &cx.topology.gateway.namespace;
    let route = || shell(cx, "ip -6 route show default proto ra");
    advertise(cx)?;
    let learned = wait_for("the advertised route", 5 * SECOND, || {
        Ok(Some(route()?).filter(|route| route.contains("dev eth0")))
    })?;
    let listens = || gateway.run(|| Ok(std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra")?));
    ensure!(listens()?.trim() == "1", "accept_ra is {} at first", listens()?);
    let mut lab = serve(cx, Launch::default())?;
    reach(cx)?;
    ensure!(listens()?.trim() == "2", "accept_ra is {}", listens()?);
    ensure!(route()?.contains("dev eth0"), "{learned} is gone");
    lab.terminate(3 * SECOND)?;
    ensure!(listens()?.trim() == "1", "accept_ra is {} at last", listens()?);
    ensure!(route()?.contains("dev eth0"), "{learned} is gone at last");
    Ok(())
}

/// A router advertisement (RFC 4861 section 4.2) towards the gateway: a default route for half an hour.
fn advertise(cx: &Context) -> Result<()> {
    use socket2::{Domain, Protocol, SockAddr, Socket, Type};
    // The kernel computes the checksum of ICMPv6 (RFC 3542 section 3.1).
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    cx.topology.router.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        let interface = rustix::net::netdevice::name_to_index(&socket, "gw")?;
        socket.set_multicast_hops_v6(255)?;
        socket.set_multicast_if_v6(interface)?;
        let all_nodes = SocketAddrV6::new("ff02::1".parse()?, 0, 0, interface);
        socket.send_to(&ADVERTISEMENT, &SockAddr::from(all_nodes))?;
        Ok(())
    })
}

/// What `firezone-gateway-init` of upstream adds (cli-and-service.md section 16.6), said as its own words would be.
const UPSTREAM: &str = "\
set -eu
for iptables in iptables ip6tables; do
  case $iptables in iptables) range=100.64.0.0/11 ;; *) range=fd00:2021:1111::/107 ;; esac
  $iptables -I FORWARD 1 -i tun-firezone -j ACCEPT
  $iptables -I FORWARD 1 -o tun-firezone -j ACCEPT
  $iptables -t nat -A POSTROUTING -s $range -o e+ -j MASQUERADE
  $iptables -t nat -A POSTROUTING -s $range -o w+ -j MASQUERADE
done
";

/// Rules that look alike, and are somebody else's.
const ALIKE: &str = "\
set -eu
for iptables in iptables ip6tables; do
  case $iptables in iptables) range=100.64.0.0/11 ;; *) range=fd00:2021:1111::/107 ;; esac
  $iptables -A FORWARD -i tun-firezone -p tcp -j ACCEPT
  $iptables -A FORWARD -i tun-firezone -j DROP
  $iptables -A FORWARD -o tun-firezone0 -j ACCEPT
  $iptables -t nat -A POSTROUTING -s $range -o eth1 -j MASQUERADE
  $iptables -t nat -A POSTROUTING -o e+ -j MASQUERADE
done
";

/// `cleanup --upstream-rules`, also while our daemon runs. The daemon by itself leaves them alone.
pub(super) fn upstream(cx: &mut Context) -> Result<()> {
    shell(cx, ALIKE)?;
    let alike = Machine::now(cx)?;
    shell(cx, UPSTREAM)?;
    let both = Machine::now(cx)?;
    let mut lab = serve(cx, Launch::default())?;
    reach(cx)?;
    lab.terminate(3 * SECOND)?;
    ensure!(Machine::now(cx)?.rules == both.rules, "the daemon has touched them: {:?}", Machine::now(cx)?);
    cleanup(cx, &[])?.success()?;
    ensure!(Machine::now(cx)?.rules == both.rules, "cleanup has touched them: {:?}", Machine::now(cx)?);

    let mut daemon = start_gateway(cx, "gateway-again", &lab.gateway_token, &lab.portal.url(), "info")?;
    wait_for("the table", 5 * SECOND, || Ok(table(cx)?.status.success().then_some(())))?;
    let said = cleanup(cx, &["--upstream-rules"])?.success()?;
    ensure!(said.lines().count() == 8, "{said}");
    ensure!(table(cx)?.status.success(), "our own table went with them");
    rest::terminate(&mut daemon, 8 * SECOND, 1)?;
    ensure!(Machine::now(cx)?.rules == alike.rules, "of {alike:?} remains {:?}", Machine::now(cx)?);
    let said = cleanup(cx, &["--upstream-rules"])?.success()?;
    ensure!(said == "There was nothing to remove\n", "{said}");
    Ok(())
}

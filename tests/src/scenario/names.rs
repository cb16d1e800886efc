//! DNS resources: names that clients assign proxy addresses to, and what the gateway makes of them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    dns::{Nameserver, ResolvConf},
    lab::{Download, Lab, Options, curl, lan4, ping},
};
use crate::{
    net::{
        NetNs,
        topology::{LAN_HOST, LAN_HOST_2, PORTAL},
    },
    standins::{
        client::{Command, Event},
        portal::Resource,
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// What a client assigns to a name: some of both families, and more than it needs.
pub(crate) const PROXIES: [&str; 4] =
    ["100.96.0.1", "100.96.0.2", "fd00:2021:1111:8000::1", "fd00:2021:1111:8000::2"];

pub(super) fn names() -> Resource {
    Resource::dns("names", "*.lan.test")
}

fn locked() -> Resource {
    Resource::dns("locked", "**.locked.test")
}

/// What the gateway says of names: those it finds, those without an address, those it has no business with.
pub(super) fn statuses(cx: &mut Context) -> Result<()> {
    let (v4, v6) = LAN_HOST;
    let hosts =
        [format!("both.lan.test,{v4},{v6}"), format!("four.lan.test,{v4}"), format!("six.lan.test,{v6}")];
    let _nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &hosts)?;
    let mut lab = start(cx, vec![lan4(), names(), locked()], &[lan4(), names()])?;
    for (what, resource, name, expect) in [
        ("both families", names(), "both.lan.test", "Active"),
        ("again, at once", names(), "both.lan.test", "Active"),
        ("IPv4 only", names(), "four.lan.test", "Active"),
        ("IPv6 only", names(), "six.lan.test", "Active"),
        ("in another case, with a dot", names(), "BOTH.Lan.Test.", "Active"),
        ("no such name", names(), "nobody.lan.test", "Active"),
        ("not of this resource", names(), "both.lan.example", "Inactive"),
        ("two labels for one", names(), "a.both.lan.test", "Inactive"),
        ("not authorised", locked(), "both.locked.test", "Inactive"),
        ("not a DNS resource", lan4(), "both.lan.test", "Inactive"),
    ] {
        let status = assign(&mut lab, &resource, name).with_context(|| format!("{what}: {name}"))?;
        ensure!(status == expect, "{what}: {name} is {status}");
    }
    lab.finish()
}

/// Ordinary programs reach what a name stands for, over both families. When its address changes, what begins then goes to the
/// new one, and what runs is left alone.
pub(super) fn reached(cx: &mut Context) -> Result<()> {
    let record = |host: (Ipv4Addr, Ipv6Addr)| [format!("web.lan.test,{},{}", host.0, host.1)];
    let mut nameserver = Nameserver::start_with(cx, "names", PORTAL, "-", &record(LAN_HOST))?;
    let mut lab = start(cx, vec![names()], &[names()])?;
    let client = &cx.topology.clients[0].namespace;
    let status = assign(&mut lab, &names(), "web.lan.test")?;
    ensure!(status == "Active", "web.lan.test is {status}");
    let (v4, v6) = proxies()?;
    for (proxy, host) in [(v4, IpAddr::from(LAN_HOST.0)), (v6, LAN_HOST.1.into())] {
        ping(client, proxy)?;
        let reached = fetch(client, proxy)?;
        ensure!(reached == host, "{proxy} leads to {reached} instead of {host}");
    }
    // What nobody assigned leads nowhere, and the client is told.
    let nobodys = "100.96.0.9".parse()?;
    ensure!(fetch(client, nobodys).is_err(), "{nobodys} leads somewhere");
    lab.clients[0].wait_for(
        "a denial",
        SECOND,
        |event| matches!(event, Event::IcmpProhibited { dst } if *dst == nobodys),
    )?;

    let slow = Download::start(cx, client, "slow", &format!("http://{v4}/slow"))?;
    slow.wait_growth(5 * SECOND)?;
    nameserver.kill()?;
    let _nameserver = Nameserver::start_with(cx, "names-2", PORTAL, "-", &record(LAN_HOST_2))?;
    let status = assign(&mut lab, &names(), "web.lan.test")?;
    ensure!(status == "Active", "web.lan.test is {status} at its new address");
    for (proxy, host) in [(v4, IpAddr::from(LAN_HOST_2.0)), (v6, LAN_HOST_2.1.into())] {
        let reached = fetch(client, proxy)?;
        ensure!(reached == host, "{proxy} leads to {reached} instead of {host}, the new address");
    }
    slow.wait_growth(5 * SECOND).context("what began before the name moved")?;

    // The next packet after a revocation is refused, that of the download too.
    lab.clients[0].forget_events();
    lab.portal.reject_access(lab.client_id(0)?, names().id)?;
    lab.clients[0].wait_goodbye(5 * SECOND)?;
    ensure!(fetch(client, v4).is_err(), "a revoked name is reached");
    drop(slow);
    lab.finish()
}

/// A gateway that asks the portal's host about names, and a client with access to `granted` of the resources.
pub(super) fn start(cx: &Context, resources: Vec<Resource>, granted: &[Resource]) -> Result<Lab> {
    let launch = ResolvConf::new(cx, &[PORTAL])?.launch(cx)?;
    let mut lab = Lab::start(cx, &Options { resources, launch, ..Options::default() })?;
    lab.connect(0, granted)?;
    Ok(lab)
}

/// The first of each family.
fn proxies() -> Result<(IpAddr, IpAddr)> {
    Ok((PROXIES[0].parse()?, PROXIES[2].parse()?))
}

/// Which of its addresses the LAN's web server was reached at.
pub(super) fn fetch(client: &NetNs, proxy: IpAddr) -> Result<IpAddr> {
    let host = if proxy.is_ipv6() { format!("[{proxy}]") } else { proxy.to_string() };
    let said = curl(client, &["-f", &format!("http://{host}/address")])?.success()?;
    said.trim().parse().with_context(|| format!("{said:?} is no address"))
}

/// Client 0 assigns [`PROXIES`] to a name. What the gateway answers.
pub(crate) fn assign(lab: &mut Lab, resource: &Resource, name: &str) -> Result<String> {
    assign_to(lab, resource, name, &PROXIES)
}

/// Client 0 assigns these to a name. What the gateway answers.
pub(super) fn assign_to(lab: &mut Lab, resource: &Resource, name: &str, proxies: &[&str]) -> Result<String> {
    let client = &mut lab.clients[0];
    client.forget_events();
    let proxies = proxies.iter().map(|ip| ip.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    client.command(&Command::Assign { resource: resource.id, domain: name.into(), proxies })?;
    // As it was sent, less the dot (test-vectors.md section 7.2).
    let name = name.trim_end_matches('.');
    client.wait_for("an answer", 5 * SECOND, |event| {
        matches!(event, Event::DomainStatus { resource: id, domain, .. } if *id == resource.id && domain == name)
    })?;
    let status = client.events().iter().find_map(|event| match event {
        Event::DomainStatus { status, .. } => Some(status.clone()),
        _ => None,
    });
    status.context("the answer that was just waited for")
}

//! DNS resources: names that clients assign proxy addresses to, and what the gateway makes of them.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    Context,
    dns::{Nameserver, ResolvConf},
    lab::{Lab, Options, lan4},
};
use crate::{
    net::topology::{LAN_HOST, PORTAL},
    standins::{
        client::{Command, Event},
        portal::Resource,
    },
};

const SECOND: Duration = Duration::from_secs(1);

/// What a client assigns to a name: some of both families, and more than it needs.
const PROXIES: [&str; 4] = ["100.96.0.1", "100.96.0.2", "fd00:2021:1111:8000::1", "fd00:2021:1111:8000::2"];

fn names() -> Resource {
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
    let options = Options {
        resources: vec![lan4(), names(), locked()],
        launch: ResolvConf::new(cx, &[PORTAL])?.launch(cx)?,
        ..Options::default()
    };
    let mut lab = Lab::start(cx, &options)?;
    lab.connect(0, &[lan4(), names()])?;
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
        anyhow::ensure!(status == expect, "{what}: {name} is {status}");
    }
    lab.finish()
}

/// What the gateway answers.
fn assign(lab: &mut Lab, resource: &Resource, name: &str) -> Result<String> {
    let client = &mut lab.clients[0];
    client.forget_events();
    let proxies = PROXIES.iter().map(|ip| ip.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
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

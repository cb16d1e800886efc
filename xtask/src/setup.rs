//! `cargo xtask setup`: what a fresh Debian 12 with rustup's stable toolchain, gcc and git lacks.
//!
//! One table says what is needed, why, and how to see that it is there. Nothing is installed that is not missing, and
//! nothing before it has been named. Services that Debian starts on installation are not started.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::{
    portable, run,
    toolchain::{self, LLVM_PREFIX, Toolchain},
};

/// Debian package, a program in it by which it is recognised, what we use it for.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("bind9-dnsutils", "dig", "DNS questions through the tunnel"),
    ("bpftool", "bpftool", "the BPF object test"),
    ("coturn", "turnserver", "the relay of the test network"),
    ("curl", "curl", "HTTP through the tunnel"),
    ("dnsmasq-base", "dnsmasq", "the DNS server of the test network"),
    ("ethtool", "ethtool", "GRO and offloads of the test network's links"),
    ("iperf3", "iperf3", "throughput"),
    ("iproute2", "ip", "network namespaces"),
    ("iptables", "iptables", "firewalls of others on the gateway's machine"),
    ("iputils-ping", "ping", "ping through the tunnel"),
    ("nftables", "nft", "NAT of the test network"),
    ("nginx-light", "nginx", "the HTTP server of the test network"),
    ("traceroute", "traceroute", "hops through the tunnel"),
    ("util-linux", "nsenter", "entering namespaces"),
    ("util-linux", "setpriv", "processes that end with their test"),
    ("util-linux", "taskset", "cores of the benchmark"),
    ("util-linux", "unshare", "the BPF object test"),
    ("wireguard-go", "wireguard-go", "a peer in the benchmark"),
    ("wireguard-tools", "wg", "setting up the peers in the benchmark"),
];

/// Debian package, a module of Debian's own Python in it by which it is recognised, what we use it for.
const MODULES: &[(&str, &str, &str)] = &[
    ("python3-grpcio", "grpc", "the collector that metrics are sent to"),
    (
        "python3-prometheus-client",
        "prometheus_client.openmetrics.parser",
        "reading the gateway's metrics as Prometheus does",
    ),
];

/// Their packages start these at installation and at every boot; the tests start their own in namespaces.
const SERVICES: &[(&str, &str)] = &[("coturn", "coturn"), ("nginx-light", "nginx")];

/// Crate, version, what for. A version is named so that a new release cannot break a machine that is set up tomorrow.
const BPF_LINKER: (&str, &str, &str) = ("bpf-linker", "0.13.0", "linking the kernel plane");
const CARGO_DENY: (&str, &str, &str) = ("cargo-deny", "0.20.2", "licences and sources of dependencies");

/// Something that is missing, and what installs it.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    Package(&'static str, &'static str),
    Crate(&'static str, &'static str, &'static str),
    Component(&'static str, &'static str),
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Package(name, why) => write!(f, "Debian package {name}: {why}"),
            Self::Crate(name, version, why) => write!(f, "cargo tool {name} {version}: {why}"),
            Self::Component(name, why) => write!(f, "rustup component {name}: {why}"),
        }
    }
}

/// `cargo xtask setup --check`: reports; the exit code is 1 if something is missing.
pub fn check() -> ExitCode {
    let missing = missing();
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return ExitCode::SUCCESS;
    }
    println!("setup: missing here, `cargo xtask setup` installs it:");
    for one in &missing {
        println!("  {one}");
    }
    ExitCode::FAILURE
}

/// `cargo xtask setup`: says what is missing and installs it.
///
/// # Errors
/// If something cannot be installed, or this is not root and a package is missing.
pub fn install() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(());
    }
    println!("setup: installing what is missing:");
    for one in &missing {
        println!("  {one}");
    }
    let packages: Vec<_> = missing
        .iter()
        .filter_map(|m| if let Missing::Package(name, _) = m { Some(*name) } else { None })
        .collect();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for one in &missing {
        match one {
            Missing::Package(..) => {}
            Missing::Crate(name, version, _) => install_crate(name, version)?,
            Missing::Component(name, _) => {
                run::run(run::command("rustup").args(["component", "add", name]))?;
            }
        }
    }
    let left = self::missing();
    if !left.is_empty() {
        let left: Vec<_> = left.iter().map(ToString::to_string).collect();
        bail!("still missing after the installation: {}", left.join("; "));
    }
    println!("setup: done");
    Ok(())
}

/// What is missing, in the order in which it must be installed; empty if nothing is.
fn missing() -> Vec<Missing> {
    let has = |program: &str| run::find_program(program).is_some();
    let mut missing = Vec::new();
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if run::output(run::cargo().args([probe, "--version"])).is_none() {
            missing.push(Missing::Component(component, "checks of the source"));
        }
    }
    let linker = toolchain::bpf_linker().is_some();
    if Toolchain::find().is_none() {
        let why = "Rust compiler for the kernel plane";
        missing.extend(toolchain::COMPILER_PACKAGES.iter().map(|name| Missing::Package(name, why)));
    }
    if !linker {
        missing.extend(toolchain::LINKER_PACKAGES.iter().map(|n| Missing::Package(n, "building bpf-linker")));
    }
    for (package, why) in portable::missing_packages() {
        // The compiler may be in the list already.
        if !missing.iter().any(|one| matches!(one, Missing::Package(name, _) if *name == package)) {
            missing.push(Missing::Package(package, why));
        }
    }
    for (package, program, why) in PROGRAMS {
        if !has(program) {
            missing.push(Missing::Package(package, why));
        }
    }
    for (package, module, why) in MODULES {
        let probe = format!("import {module}");
        if run::output(run::command("/usr/bin/python3").args(["-c", &probe])).is_none() {
            missing.push(Missing::Package(package, why));
        }
    }
    if !linker {
        missing.push(Missing::Crate(BPF_LINKER.0, BPF_LINKER.1, BPF_LINKER.2));
    }
    if !has(CARGO_DENY.0) {
        missing.push(Missing::Crate(CARGO_DENY.0, CARGO_DENY.1, CARGO_DENY.2));
    }
    missing
}

/// Installs without starting anything: invoke-rc.d and deb-systemd-invoke ask policy-rc.d first.
///
/// A shell does it, so that its trap removes the policy again on Ctrl-C too. A policy that is already there (container
/// images have one) is left alone; services that it lets start are stopped, unless they ran before.
fn install_packages(packages: &[&str]) -> Result<()> {
    const SCRIPT: &str = r#"
set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\n# cargo xtask setup: install, but start nothing\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
apt-get update -q
apt-get install -q -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@"
"#;
    if run::find_program("apt-get").is_none() {
        bail!("this machine has no apt-get; install by its own means: {}", packages.join(" "));
    }
    if !run::is_root() {
        bail!(
            "Debian packages are missing and only root can install them: apt-get install {}",
            packages.join(" ")
        );
    }
    let running_before: Vec<_> = SERVICES.iter().filter(|(_, unit)| is_active(unit)).collect();
    let mut shell = run::command("sh");
    shell.args(["-c", SCRIPT, "setup"]).args(packages).env("DEBIAN_FRONTEND", "noninteractive");
    run::run(&mut shell).context("cannot install the Debian packages named above")?;
    for service in SERVICES.iter().filter(|(package, _)| packages.contains(package)) {
        if running_before.contains(&service) {
            continue;
        }
        let (_, unit) = service;
        if let Err(error) = keep_from_booting(unit) {
            println!("setup: {unit} may start at the next boot: {error:#}");
        }
        if is_active(unit) {
            run::run(run::command("systemctl").args(["stop", unit]))?;
        }
    }
    Ok(())
}

fn keep_from_booting(unit: &str) -> Result<()> {
    if run::find_program("systemctl").is_some() {
        // Works without a running systemd too, and takes the links of System V with it.
        return run::run(run::command("systemctl").args(["disable", "--quiet", unit]));
    }
    // On every Debian. It turns the links in /etc/rc?.d off, and those of a systemd that may be installed later.
    run::run(run::command("update-rc.d").args([unit, "disable"]))
}

fn is_active(unit: &str) -> bool {
    run::output(run::command("systemctl").args(["is-active", unit])).is_some()
}

fn install_crate(name: &str, version: &str) -> Result<()> {
    let mut cargo = run::cargo();
    cargo.args(["install", "--version", version, name]);
    if name == BPF_LINKER.0 {
        cargo.args(["--no-default-features", "--features", "llvm-22"]).env("LLVM_PREFIX", LLVM_PREFIX);
    } else {
        cargo.arg("--locked");
    }
    run::run(&mut cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_of_scenarios_and_benchmark_is_installed() {
        let files = ["tests/src/net/services.rs", "tests/src/bench/mod.rs"];
        let text: String =
            files.map(|file| std::fs::read_to_string(run::root().join(file)).unwrap()).concat();
        let lists = text.split("const PROGRAMS").skip(1).map(|rest| rest.split_once("];").unwrap().0);
        let needed: Vec<Vec<&str>> = lists
            .flat_map(str::lines)
            .map(|line| line.split('"').skip(1).step_by(2).collect())
            .filter(|names: &Vec<_>| names.len() == 2)
            .collect();
        assert!(needed.len() > 10, "{needed:?}");
        for names in needed {
            let installed = PROGRAMS.iter().any(|(package, program, _)| [*program, *package] == names[..]);
            assert!(installed, "setup does not install {names:?}");
        }
    }
}

//! Which crate may depend on what. Each line has its reason; cargo enforces none of it by itself.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::run;

/// Package, a crate that it must not reach over any number of steps, why.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("gateway-proto", "tokio", "the core has no runtime: time and bytes are arguments"),
    ("gateway-proto", "mio", "the core waits for nothing"),
    ("gateway-proto", "socket2", "the core has no sockets"),
    ("gateway-proto", "quinn-udp", "the core has no sockets"),
    ("gateway-proto", "tun-rs", "the core has no device"),
    ("gateway-proto", "rtnetlink", "the core does not configure interfaces"),
    ("gateway-proto", "aya", "the core does not know whether there is a fast path"),
    ("gateway-proto", "hickory-resolver", "names are resolved by the shell"),
    ("firezone-gateway", "openssl", "TLS is rustls; nothing is linked that the target machine must have"),
    ("firezone-gateway", "native-tls", "TLS is rustls"),
    ("gateway-common", "gateway-proto", "the contract knows neither of its sides"),
    ("xtask", "firezone-gateway", "xtask must build where nothing else builds yet"),
    ("xtask", "gateway-proto", "xtask must build where nothing else builds yet"),
    ("xtask", "gateway-common", "xtask must build where nothing else builds yet"),
    ("xtask", "gateway-tests", "xtask must build where nothing else builds yet"),
];

/// Manifest, the only direct dependencies that the package may have, why so few.
const ONLY: &[(&str, &[&str], &str)] = &[
    ("gateway-common/Cargo.toml", &["bytemuck"], "it is compiled for the kernel: no alloc, no std"),
    (
        "gateway-ebpf/Cargo.toml",
        &["aya-ebpf", "aya-log-ebpf", "gateway-common"],
        "it is compiled for the kernel",
    ),
    ("xtask/Cargo.toml", &["anyhow", "clap", "serde_json"], "it is the first thing a fresh machine builds"),
];

/// Normal dependencies over any number of steps, against [`FORBIDDEN`].
pub fn forbidden() -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    let packages: BTreeSet<_> = FORBIDDEN.iter().map(|(package, ..)| *package).collect();
    for package in packages {
        let mut tree = run::cargo();
        tree.args(["tree", "--edges", "normal", "--prefix", "none", "--format", "{p}", "-p", package]);
        let tree = run::output(&mut tree).with_context(|| format!("cargo tree -p {package} failed"))?;
        complaints.extend(reached(package, &tree));
    }
    Ok(complaints)
}

fn reached(package: &str, tree: &str) -> Vec<String> {
    let names: BTreeSet<_> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    FORBIDDEN
        .iter()
        .filter(|(of, name, _)| *of == package && names.contains(name))
        .map(|(_, name, why)| format!("{package} reaches {name}; it must not: {why}"))
        .collect()
}

/// Direct dependencies, against [`ONLY`].
pub fn unexpected() -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for (manifest, allowed, why) in ONLY {
        let mut metadata = run::cargo();
        metadata.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path", manifest]);
        let metadata =
            run::output(&mut metadata).with_context(|| format!("cargo metadata of {manifest} failed"))?;
        let metadata: Value = serde_json::from_str(&metadata)?;
        let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
        let package = packages
            .iter()
            .find(|p| p["manifest_path"].as_str().is_some_and(|path| path.ends_with(manifest)))
            .with_context(|| format!("cargo metadata does not list {manifest}"))?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let name = dependency["name"].as_str().unwrap_or_default();
            if dependency["kind"] != "dev" && !allowed.contains(&name) {
                complaints.push(format!("{manifest} depends on {name}; it may on {allowed:?} only: {why}"));
            }
        }
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_crate_anywhere_in_the_tree_is_found_with_its_reason() {
        let tree = "gateway-proto v0.1.0 (/x)\nserde v1.0.0\ntokio v1.40.0\nmio-not v1.0.0\n";
        let complaints = reached("gateway-proto", tree);
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        assert!(complaints[0].contains("tokio") && complaints[0].contains("no runtime"));
        assert!(reached("firezone-gateway", tree).is_empty());
    }
}

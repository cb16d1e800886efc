//! `bundle`: one archive with what somebody who helps wants to know, and nothing that is secret.
//!
//! It holds what the gateway answers (which has no token, no key and no user in it), what the kernel says, and nothing of
//! the environment. Whatever goes in is looked through once more for what must not.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{client::Client, show, status::Status};
use crate::data::Capability;

/// What of /proc tells how this kernel treats our packets.
const KERNEL: [&str; 24] = [
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/net/dev",
    "/proc/net/softnet_stat",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/udp",
    "/proc/net/udp6",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/net/core/rmem_max",
    "/proc/sys/net/core/wmem_max",
    "/proc/sys/net/core/netdev_max_backlog",
    "/proc/sys/net/ipv4/conf/all/rp_filter",
    "/proc/sys/net/ipv4/conf/all/src_valid_mark",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/udp_mem",
    "/proc/sys/net/ipv6/conf/all/disable_ipv6",
    "/proc/sys/net/ipv6/conf/all/forwarding",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/net/netfilter/nf_conntrack_max",
    "/etc/os-release",
];

/// A file of the archive.
struct Entry {
    name: String,
    text: String,
}

/// Writes the archive and says where it is.
///
/// # Errors
/// It cannot be written. A gateway that does not answer is no error: the archive says so.
pub fn run(socket: &Path, output: Option<PathBuf>) -> Result<PathBuf> {
    let entries = gather(socket);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let path = output.unwrap_or_else(|| PathBuf::from(format!("firezone-gateway-{now}.tar")));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| {
        format!(
            "Cannot write {}; name a new file in a folder that you may write to by --output",
            path.display()
        )
    })?;
    let written = write(file, &entries, now);
    if written.is_err() {
        let _ = fs::remove_file(&path);
    }
    written.with_context(|| format!("Cannot write {}", path.display()))?;
    Ok(path)
}

fn write(file: impl Write, entries: &[Entry], now: u64) -> Result<()> {
    let mut archive = tar::Builder::new(file);
    for Entry { name, text } in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("firezone-gateway/{name}"), text.as_bytes())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

fn gather(socket: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut put = |name: &str, text: String| {
        entries.push(Entry { name: name.to_owned(), text: redact(&text) });
    };
    put("versions.json", versions());
    match Client::connect(socket) {
        Ok(mut client) => {
            match client.ask("status", Value::Null) {
                Ok(status) => {
                    put("status.json", pretty(&status));
                    if let Ok(status) = serde_json::from_value::<Status>(status) {
                        put("status.txt", show::status(&status));
                        put(
                            "capabilities.json",
                            pretty(&json!({
                                "in_use": status.capabilities, "missing": status.capabilities_missing,
                            })),
                        );
                        put("counters.json", pretty(&json!({ "dropped": status.drops })));
                    }
                }
                Err(e) => put("status.error", format!("{e:#}\n")),
            }
            match client.ask("metrics", Value::Null) {
                Ok(metrics) => put("metrics.txt", metrics["page"].as_str().unwrap_or_default().to_owned()),
                Err(e) => put("metrics.error", format!("{e:#}\n")),
            }
        }
        Err(e) => put("gateway.error", format!("{e:#}\n")),
    }
    for path in KERNEL {
        // One that is not there says something, too.
        let text = fs::read_to_string(path).unwrap_or_else(|e| format!("{e}\n"));
        put(&format!("kernel{path}"), text);
    }
    entries
}

fn versions() -> String {
    let system = rustix::system::uname();
    pretty(&json!({
        "firezone_gateway": env!("CARGO_PKG_VERSION"),
        "compat_version": crate::portal::COMPAT_VERSION,
        "kernel": system.release().to_string_lossy(),
        "arch": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "capabilities_known": Capability::ALL.iter().map(|one| one.word()).collect::<Vec<_>>(),
        "kernel_plane": crate::bpf::describe(),
    }))
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

/// Whatever this process's environment holds as a token is nowhere in the archive, wherever it came from.
fn redact(text: &str) -> String {
    redact_with(text, |name| std::env::var(name).ok())
}

fn redact_with(text: &str, variable: impl Fn(&str) -> Option<String>) -> String {
    let secrets = ["FIREZONE_TOKEN", "FIREZONE_ID"].into_iter().filter_map(variable);
    secrets
        .filter(|secret| secret.len() >= 8)
        .fold(text.to_owned(), |text, secret| text.replace(&secret, "[redacted]"))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    #[test]
    fn an_archive_is_written_without_a_gateway_and_only_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("support.tar");
        run(&folder.path().join("nobody.sock"), Some(path.clone())).unwrap();
        let mut archive = tar::Archive::new(fs::File::open(&path).unwrap());
        let mut files = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), text);
        }
        assert!(files["firezone-gateway/gateway.error"].contains("No gateway listens"), "{files:?}");
        assert!(files["firezone-gateway/versions.json"].contains(env!("CARGO_PKG_VERSION")));
        assert_eq!(files.keys().filter(|name| name.contains("/kernel/")).count(), KERNEL.len());
        let again = run(&folder.path().join("nobody.sock"), Some(path)).expect_err("it is there already");
        assert!(format!("{again:#}").contains("--output"), "{again:#}");
    }

    #[test]
    fn a_token_of_the_environment_is_taken_out_wherever_it_stands() {
        let variable = |name: &str| (name == "FIREZONE_TOKEN").then(|| "s3cret-token".to_owned());
        assert_eq!(redact_with("a s3cret-token b s3cret-tokens", variable), "a [redacted] b [redacted]s");
        assert_eq!(redact_with("a short b", |_| Some("short".to_owned())), "a short b");
    }
}

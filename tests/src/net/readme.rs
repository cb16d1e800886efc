//! What README.md tells an operator to prepare who does it without the daemon, read from README.md: a scenario and the
//! benchmark prepare their gateway by those very lines, so they cannot be wrong without being noticed.

use anyhow::{Context as _, Result};

const README: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"));

/// The kernel settings (`key=value`) and the nftables script of README.md's "Run it against a portal".
///
/// # Errors
/// If README.md has no such lines.
pub fn preparation() -> Result<(Vec<&'static str>, &'static str)> {
    read(README)
}

fn read(text: &str) -> Result<(Vec<&str>, &str)> {
    let settings = text.lines().find_map(|line| line.strip_prefix("sysctl -w ")).context("no `sysctl -w`")?;
    let (_, rest) = text.split_once("nft -f - <<'NFT'\n").context("no `nft -f - <<'NFT'`")?;
    let (script, _) = rest.split_once("NFT\n").context("the nft script does not end")?;
    Ok((settings.split_whitespace().collect(), script))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_script_are_found() {
        let text = "x\nsysctl -w a.b=1 c=2\nnft -f - <<'NFT'\ntable inet t {\n}\nNFT\n```\n";
        assert_eq!(read(text).unwrap(), (vec!["a.b=1", "c=2"], "table inet t {\n}\n"));
    }

    #[test]
    fn readme_forwards_and_masquerades_both_families() {
        let (settings, script) = preparation().unwrap();
        assert!(settings.contains(&"net.ipv4.ip_forward=1"));
        assert!(settings.contains(&"net.ipv6.conf.all.forwarding=1"));
        assert!(
            script.contains("ip saddr 100.64.0.0/11") && script.contains("ip6 saddr fd00:2021:1111::/107")
        );
    }
}

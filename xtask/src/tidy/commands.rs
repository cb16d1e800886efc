//! Commands, flags and variables that the documents name, against the programs that must know them.

use std::{collections::BTreeSet, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::docs::DOCUMENTS;
use crate::run;

/// `cargo xtask` lines that this very program does not understand.
pub fn unknown_subcommands() -> Result<Vec<String>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut complaints = Vec::new();
    for document in DOCUMENTS {
        let text = read(document)?;
        for Invocation { subcommand, flags } in invocations(&text) {
            let Some(help) = run::output(Command::new(&program).args([&subcommand, "--help"])) else {
                complaints.push(format!("{document} names `cargo xtask {subcommand}`, which does not exist"));
                continue;
            };
            let unknown = flags.iter().filter(|flag| !names(&help, flag));
            complaints.extend(unknown.map(|flag| {
                format!("{document} names `cargo xtask {subcommand} {flag}`; there is no such flag")
            }));
        }
    }
    Ok(complaints)
}

/// Flags and `FIREZONE_` variables of the daemon in README.md that no file of the daemon reads.
pub fn unknown_options() -> Result<Vec<String>> {
    let cli = read("gateway/src/cli.rs")?;
    let mut sources = cli.clone();
    for file in ["gateway/src/main.rs", "gateway/src/identity.rs", "gateway/src/data/capabilities.rs"] {
        sources.push_str(&read(file)?);
    }
    let readme = read("README.md")?;
    let flags = daemon_flags(&readme);
    ensure!(!flags.is_empty(), "README.md names no flag of the daemon");
    // Of the daemon, or of one of its commands.
    let is_defined = |flag: &str| {
        let field = flag.trim_start_matches('-').replace('-', "_");
        cli.contains(&format!("    pub {field}:")) || cli.contains(&format!("        {field}:"))
    };
    let flags = flags
        .into_iter()
        .filter(|flag| *flag != "--help" && !is_defined(flag))
        .map(|flag| format!("README.md names {flag}, which gateway/src/cli.rs does not define"));
    let variables = variables(&readme)
        .into_iter()
        .filter(|name| !sources.contains(&format!("\"{name}\"")))
        .map(|name| format!("README.md names {name}, which the daemon does not read"));
    Ok(flags.chain(variables).collect())
}

/// One `cargo xtask` command in a document.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Invocation {
    subcommand: String,
    flags: Vec<String>,
}

fn invocations(text: &str) -> BTreeSet<Invocation> {
    let commands = text.lines().flat_map(|line| line.split("cargo xtask ").skip(1));
    commands
        .filter_map(|rest| {
            let end = rest.find(['`', '#']).unwrap_or(rest.len());
            let mut words = rest[..end].split_whitespace();
            let subcommand = words.next()?.to_owned();
            let flags = words.filter(|word| word.starts_with("--")).map(str::to_owned).collect();
            // A document may speak of `cargo xtask <command>`.
            subcommand
                .chars()
                .all(|c| c.is_ascii_lowercase() || c == '-')
                .then_some(Invocation { subcommand, flags })
        })
        .collect()
}

/// Code in backticks that is a flag, or a command line of the daemon with flags.
fn daemon_flags(text: &str) -> BTreeSet<&str> {
    let code = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    code.filter(|code| code.starts_with("--") || code.starts_with("firezone-gateway "))
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with("--"))
        .map(|word| word.split('=').next().unwrap_or(word))
        .collect()
}

fn variables(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|word| word.starts_with("FIREZONE_") && word.len() > "FIREZONE_".len())
        .collect()
}

/// Does the help text list exactly this flag?
fn names(help: &str, flag: &str) -> bool {
    help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| word == flag)
}

fn read(file: impl AsRef<Path>) -> Result<String> {
    let file = file.as_ref();
    std::fs::read_to_string(run::root().join(file)).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_in_blocks_and_in_sentences() {
        let text = "```sh\ncargo xtask demo --hold   # --not this\ncargo xtask test\n```\n\
                    So `cargo xtask test` and `cargo xtask build-ebpf --log` and `cargo xtask <command>`; cargo build.\n";
        let found: Vec<_> = invocations(text)
            .into_iter()
            .map(|i| std::iter::once(i.subcommand).chain(i.flags).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(found, ["build-ebpf --log", "demo --hold", "test"]);
    }

    #[test]
    fn flags_and_variables_of_the_daemon_are_told_from_those_of_others() {
        let text = "`--ca-file roots.pem`, `firezone-gateway --help`, `cargo build --release`, `FIREZONE_ID`,\n\
                    FIREZONE_TOKEN=... firezone, -- `--portal-endpoint=v1`";
        assert_eq!(Vec::from_iter(daemon_flags(text)), ["--ca-file", "--help", "--portal-endpoint"]);
        assert_eq!(Vec::from_iter(variables(text)), ["FIREZONE_ID", "FIREZONE_TOKEN"]);
    }

    #[test]
    fn a_flag_is_not_found_inside_a_longer_one() {
        assert!(names("  --hold  Leave it running", "--hold"));
        assert!(!names("  --hold-on  Leave it running", "--hold"));
    }

    #[test]
    fn every_option_that_readme_names_exists() {
        assert_eq!(unknown_options().unwrap(), Vec::<String>::new());
    }
}

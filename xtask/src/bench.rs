//! `cargo xtask bench`: sets the machine up, builds everything in release and becomes `gateway-tests bench`.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};

use crate::{build_ebpf, run, setup};

/// A peer that Debian does not have; a version is named so that figures of two days compare. It goes into
/// `target/peers`, not among the user's programs.
const BORINGTUN: (&str, &str) = ("boringtun-cli", "0.7.1");

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Fewer and shorter runs: about 4 minutes instead of 15.
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains this; nothing is written.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Does not return once the benchmark runs: it takes this process over, so Ctrl-C reaches it and nothing else.
///
/// # Errors
/// If something cannot be installed or built, or this is not root.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("the benchmark makes network namespaces, which needs root: run it as root or by sudo");
    }
    setup::install()?;
    build_ebpf::build(false)?;
    println!("bench: building the daemon and the test network in release");
    run::run(run::cargo().args(["build", "--release", "-p", "firezone-gateway", "-p", "gateway-tests"]))?;
    install_peer()?;
    let program = run::target().join("release/gateway-tests");
    let mut bench = Command::new(&program);
    bench.arg("bench").args(arguments.quick.then_some("--quick"));
    if let Some(only) = &arguments.only {
        bench.arg("--only").arg(only);
    }
    Err(bench.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// Without it the benchmark runs and says so, but a comparison with nobody is none.
fn install_peer() -> Result<()> {
    let (name, version) = BORINGTUN;
    let folder = run::target().join("peers");
    if folder.join("bin").join(name).is_file() {
        return Ok(());
    }
    println!("bench: building {name} {version}");
    let mut cargo = run::cargo();
    cargo.args(["install", "--locked", "--version", version, "--root"]).arg(&folder).arg(name);
    run::run(cargo.arg("--target-dir").arg(folder.join("build")))
}

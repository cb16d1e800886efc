//! `cargo xtask demo`: sets the machine up, builds everything in release and becomes `gateway-tests demo`.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};

use crate::{build_ebpf, run, setup};

/// Does not return once the demo runs: it takes this process over, so Ctrl-C reaches it and nothing else.
///
/// # Errors
/// If something cannot be installed or built, or this is not root.
pub fn run(hold: bool) -> Result<ExitCode> {
    if !run::is_root() {
        bail!("the demo makes network namespaces, which needs root: run it as root or by sudo");
    }
    setup::install()?;
    build_ebpf::build(false)?;
    println!("demo: building the daemon and the test network in release");
    run::run(run::cargo().args(["build", "--release", "-p", "firezone-gateway", "-p", "gateway-tests"]))?;
    let program = run::target().join("release/gateway-tests");
    let mut demo = Command::new(&program);
    demo.arg("demo").args(hold.then_some("--hold"));
    Err(demo.exec()).with_context(|| format!("cannot start {}", program.display()))
}

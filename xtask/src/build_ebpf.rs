//! `cargo xtask build-ebpf`: compiles `gateway-ebpf` to the two objects that `gateway/build.rs` embeds: all of it, and the
//! steering programs without what needs more rights than they do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{
    run,
    toolchain::{self, Toolchain},
};

const CURE: &str = "`cargo xtask setup` installs it";

/// Where the object is put; `gateway/build.rs` looks here.
pub fn object() -> PathBuf {
    run::root().join("target/bpf/firezone-gateway.o")
}

/// Builds the object and says with what; the result is its path.
///
/// # Errors
/// If the toolchain is not there, the code does not compile, or the object cannot be written.
pub fn build(log: bool) -> Result<PathBuf> {
    let toolchain = compiler()?;
    let linker = toolchain::bpf_linker().with_context(|| format!("bpf-linker is not installed; {CURE}"))?;
    println!("build-ebpf: with {toolchain} and {}", linker.display());

    compile(&toolchain, &linker, log, &object().with_file_name("firezone-steering.o"), false)?;
    compile(&toolchain, &linker, log, &object(), true)?;
    Ok(object())
}

/// One object; `whole` is with XDP.
fn compile(toolchain: &Toolchain, linker: &Path, log: bool, object: &Path, whole: bool) -> Result<()> {
    let folder = object.parent().expect("the object is in a folder").join("cargo");
    let mut cargo = toolchain.cargo_bpf("build");
    cargo.args(["--release", "--locked", "--manifest-path", "gateway-ebpf/Cargo.toml"]);
    cargo.arg("--target-dir").arg(&folder);
    if !whole {
        cargo.arg("--no-default-features");
    }
    // Only `uplink` logs.
    if log && whole {
        cargo.args(["--features", "log"]);
    }
    let linker = format!("-Clinker={}", linker.display());
    // Maps are described by BTF, and the verifier's messages show source lines.
    let mut flags = vec![linker.as_str(), "-Clink-arg=--btf", "-Cdebuginfo=2"];
    let architecture = flags_for(std::env::consts::ARCH);
    flags.extend(architecture.iter().map(String::as_str));
    run::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")))?;

    let built = folder.join(toolchain::TARGET).join("release/firezone-gateway");
    let bytes = std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    // An object that did not change must not make cargo build the daemon again.
    if std::fs::read(object).ok().as_ref() != Some(&bytes) {
        std::fs::write(object, &bytes).with_context(|| format!("cannot write {}", object.display()))?;
    }
    println!("build-ebpf: {} ({} bytes)", object.display(), bytes.len());
    Ok(())
}

/// Checks the kernel plane for the machine that `architecture` names, as rustc does (`aarch64`); nothing is linked.
///
/// # Errors
/// If the toolchain is not there or the code does not compile.
pub fn check(architecture: &str) -> Result<()> {
    let mut cargo = compiler()?.cargo_bpf("check");
    cargo.args(["--release", "--locked", "--manifest-path", "gateway-ebpf/Cargo.toml"]);
    cargo.arg("--target-dir").arg(run::root().join("target/bpf/cargo"));
    run::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", flags_for(architecture).join("\x1f")))
}

fn compiler() -> Result<Toolchain> {
    Toolchain::find()
        .with_context(|| format!("no Rust compiler with `core` for {} found; {CURE}", toolchain::TARGET))
}

fn flags_for(architecture: &str) -> [String; 4] {
    [
        "--cfg".to_owned(),
        // Which machine's registers the bindings describe.
        format!("bpf_target_arch=\"{architecture}\""),
        // Without ALU32 (v3) the code is 13 % slower.
        "-Ctarget-cpu=v3".to_owned(),
        // Else unaligned reads of headers become byte loads.
        "-Ctarget-feature=+allows-misaligned-mem-access".to_owned(),
    ]
}

//! `cargo xtask build-ebpf`: compiles `gateway-ebpf` to the object that `gateway/build.rs` embeds.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    run,
    toolchain::{self, Toolchain},
};

/// Where the object is put; `gateway/build.rs` looks here.
pub fn object() -> PathBuf {
    run::root().join("target/bpf/firezone-gateway.o")
}

/// Builds the object and says with what; the result is its path.
///
/// # Errors
/// If the toolchain is not there, the code does not compile, or the object cannot be written.
pub fn build(log: bool) -> Result<PathBuf> {
    const CURE: &str = "`cargo xtask setup` installs it";
    let toolchain = Toolchain::find()
        .with_context(|| format!("no Rust compiler with `core` for {} found; {CURE}", toolchain::TARGET))?;
    let linker = toolchain::bpf_linker().with_context(|| format!("bpf-linker is not installed; {CURE}"))?;
    println!("build-ebpf: with {toolchain} and {}", linker.display());

    let object = object();
    let folder = object.parent().expect("the object is in a folder").join("cargo");
    let mut cargo = toolchain.cargo_build();
    cargo.args(["--release", "--locked", "--manifest-path", "gateway-ebpf/Cargo.toml"]);
    cargo.arg("--target-dir").arg(&folder);
    if log {
        cargo.args(["--features", "log"]);
    }
    let architecture = format!("bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    let linker = format!("-Clinker={}", linker.display());
    let flags = [
        linker.as_str(),
        // Maps are described by BTF, and the verifier's messages show source lines.
        "-Clink-arg=--btf",
        "-Cdebuginfo=2",
        "--cfg",
        &architecture,
        // Without ALU32 (v3) the code is 13 % slower.
        "-Ctarget-cpu=v3",
        // Else unaligned reads of headers become byte loads.
        "-Ctarget-feature=+allows-misaligned-mem-access",
    ];
    run::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")))?;

    let built = folder.join(toolchain::TARGET).join("release/firezone-gateway");
    let bytes = std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    // An object that did not change must not make cargo build the daemon again.
    if std::fs::read(&object).ok().as_ref() != Some(&bytes) {
        std::fs::write(&object, &bytes).with_context(|| format!("cannot write {}", object.display()))?;
    }
    println!("build-ebpf: {} ({} bytes)", object.display(), bytes.len());
    Ok(object)
}

//! Which compiler builds the kernel plane: it needs `core` for `bpfel-unknown-none`, which rustup's stable lacks.
//!
//! Debian ships it beside its own rustc; rustup's nightly builds it from source. Either links with `bpf-linker`.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::run;

/// The target of the kernel plane.
pub const TARGET: &str = "bpfel-unknown-none";
/// What Debian 12 lacks to compile for [`TARGET`].
pub const COMPILER_PACKAGES: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf"];
/// What Debian 12 lacks to build `bpf-linker`.
pub const LINKER_PACKAGES: &[&str] =
    &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
/// Where [`LINKER_PACKAGES`] put LLVM.
pub const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

const DISTRO_RUSTC: &str = "/usr/bin/rustc";

/// A compiler that can build for [`TARGET`].
#[derive(Debug)]
pub enum Toolchain {
    /// The distribution's rustc, which comes with `core` built.
    Distro {
        /// What `rustc --version` says.
        version: String,
    },
    /// rustup's nightly with `rust-src`, which builds `core` itself.
    Nightly {
        /// What `rustc --version` says.
        version: String,
    },
}

impl Toolchain {
    /// The first one that this machine has.
    pub fn find() -> Option<Self> {
        distro().or_else(nightly)
    }

    /// A `cargo build` for [`TARGET`] by this compiler; arguments may be added.
    pub fn cargo_build(&self) -> Command {
        let mut command = match self {
            Self::Distro { .. } => {
                let mut command = run::cargo();
                // RUSTC_BOOTSTRAP: this rustc is a stable one, and aya's attributes are not.
                command.env("RUSTC", DISTRO_RUSTC).env("RUSTC_BOOTSTRAP", "1").arg("build");
                command
            }
            Self::Nightly { .. } => {
                let mut command = run::command("rustup");
                // Cargo and rustup pass the toolchain that runs xtask on to what it starts.
                for inherited in ["RUSTC", "RUSTDOC", "CARGO", "RUSTUP_TOOLCHAIN"] {
                    command.env_remove(inherited);
                }
                command.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
                command
            }
        };
        command.arg("--target").arg(TARGET);
        command
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Distro { version } => write!(f, "the distribution's {version} ({DISTRO_RUSTC})"),
            Self::Nightly { version } => write!(f, "rustup's nightly {version} with rust-src"),
        }
    }
}

/// Where `bpf-linker` is.
pub fn bpf_linker() -> Option<PathBuf> {
    run::find_program("bpf-linker")
}

fn distro() -> Option<Toolchain> {
    let rustc = || run::command(DISTRO_RUSTC);
    let libraries = run::output(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    let has_core = std::fs::read_dir(libraries)
        .ok()?
        .flatten()
        .any(|file| file.file_name().to_string_lossy().starts_with("libcore-"));
    let version = run::output(rustc().arg("--version"))?;
    has_core.then_some(Toolchain::Distro { version })
}

fn nightly() -> Option<Toolchain> {
    let rustc = |arguments: &[&str]| {
        run::output(run::command("rustup").args(["run", "nightly", "rustc"]).args(arguments))
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    let version = rustc(&["--version"])?;
    Path::new(&sysroot)
        .join("lib/rustlib/src/rust/library/core")
        .is_dir()
        .then_some(Toolchain::Nightly { version })
}

//! Compilers that can do more than rustup's stable: the kernel plane needs `core` for `bpfel-unknown-none`, other
//! machines need `std` for theirs.
//!
//! Debian ships the former beside its own rustc, and the source of the latter; rustup's nightly builds both from source.
//! The kernel plane is linked with `bpf-linker`.

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
/// What Debian 12 lacks to compile for other machines; in one step with the compiler, because both must have one version.
pub const SOURCE_PACKAGES: &[&str] = &["rustc-web", "rust-web-src"];
/// What Debian 12 lacks to build `bpf-linker`.
pub const LINKER_PACKAGES: &[&str] =
    &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"];
/// Where [`LINKER_PACKAGES`] put LLVM.
pub const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

const DISTRO_RUSTC: &str = "/usr/bin/rustc";

/// A compiler that takes unstable flags.
#[derive(Debug)]
pub enum Toolchain {
    /// The distribution's rustc.
    Distro {
        /// What `rustc --version` says.
        version: String,
    },
    /// rustup's nightly with `rust-src`.
    Nightly {
        /// What `rustc --version` says.
        version: String,
    },
}

impl Toolchain {
    /// The first one that this machine has and that can build for [`TARGET`].
    pub fn find() -> Option<Self> {
        distro().filter(|_| distro_has_core()).or_else(nightly)
    }

    /// The first one that this machine has and that can build `std` itself.
    pub fn with_source() -> Option<Self> {
        distro().filter(|distro| distro.source().is_some()).or_else(nightly)
    }

    /// A `cargo COMMAND` for [`TARGET`] by this compiler; arguments may be added.
    pub fn cargo_bpf(&self, subcommand: &str) -> Command {
        let mut command = self.cargo(subcommand);
        if matches!(self, Self::Nightly { .. }) {
            command.arg("-Zbuild-std=core");
        }
        command.args(["--target", TARGET]);
        command
    }

    /// A `cargo COMMAND` for any target, with `std` built from source; arguments may be added.
    pub fn cargo_std(&self, subcommand: &str, target: &str) -> Command {
        let mut command = self.cargo(subcommand);
        command.args(["-Zbuild-std=std,panic_unwind", "--target", target]);
        command
    }

    /// The folder of Rust's own source, if it is there and is this compiler's.
    pub fn source(&self) -> Option<PathBuf> {
        let (sysroot, version) = match self {
            Self::Distro { version } => {
                (run::output(run::command(DISTRO_RUSTC).args(["--print", "sysroot"]))?, version)
            }
            Self::Nightly { version } => (nightly_rustc(&["--print", "sysroot"])?, version),
        };
        let source = Path::new(&sysroot).join("lib/rustlib/src/rust");
        // Debian's package of the source does not depend on the compiler of the same version; rustup's has no such file.
        let same = std::fs::read_to_string(source.join("version"))
            .map_or(true, |of| version.split_whitespace().nth(1) == of.split_whitespace().next());
        (same && source.join("library/std").is_dir()).then_some(source)
    }

    fn cargo(&self, subcommand: &str) -> Command {
        match self {
            Self::Distro { .. } => {
                let mut command = run::cargo();
                // RUSTC_BOOTSTRAP: this rustc is a stable one; aya's attributes and -Z flags are not.
                command.env("RUSTC", DISTRO_RUSTC).env("RUSTC_BOOTSTRAP", "1").arg(subcommand);
                command
            }
            Self::Nightly { .. } => {
                let mut command = run::command("rustup");
                // Cargo and rustup pass the toolchain that runs xtask on to what it starts.
                for inherited in ["RUSTC", "RUSTDOC", "CARGO", "RUSTUP_TOOLCHAIN"] {
                    command.env_remove(inherited);
                }
                command.args(["run", "nightly", "cargo", subcommand]);
                command
            }
        }
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
    let version = run::output(run::command(DISTRO_RUSTC).arg("--version"))?;
    Some(Toolchain::Distro { version })
}

fn distro_has_core() -> bool {
    run::output(run::command(DISTRO_RUSTC).args(["--print", "target-libdir", "--target", TARGET]))
        .is_some_and(|folder| has_library(&folder, "libcore-"))
}

/// Does the folder hold a compiled library whose name begins so?
pub fn has_library(folder: &str, prefix: &str) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with(prefix)))
    })
}

fn nightly() -> Option<Toolchain> {
    let nightly = Toolchain::Nightly { version: nightly_rustc(&["--version"])? };
    nightly.source().is_some().then_some(nightly)
}

fn nightly_rustc(arguments: &[&str]) -> Option<String> {
    run::output(run::command("rustup").args(["run", "nightly", "rustc"]).args(arguments))
}

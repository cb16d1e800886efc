//! Building for other machines: `cargo xtask check-aarch64`, and the compiler of [`crate::release`].
//!
//! Where rustup has the target's `std` (`rustup target add`), cargo needs nothing else. Where it cannot be fetched, `std`
//! is built from the source that Debian packages, by Debian's compiler. C code (ring) is compiled by Debian's gcc.

use std::{
    env::consts::ARCH,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build_ebpf, run,
    toolchain::{self, Toolchain},
};

/// The other machine that users have.
pub const AARCH64: &str = "aarch64-unknown-linux-gnu";
/// The cargo profile that only asks whether it builds and starts.
pub const PROFILE: &str = "portable";
const CURE: &str = "`cargo xtask setup` installs it";

/// The target of the static binary: this machine's.
pub fn musl() -> String {
    format!("{ARCH}-unknown-linux-musl")
}

/// Where everything for other machines is built; one folder, so that what runs while building is built once.
pub fn folder() -> PathBuf {
    run::target().join("portable")
}

/// Debian packages that are missing here, and what for.
pub fn missing_packages() -> Vec<(&'static str, &'static str)> {
    let mut missing = Vec::new();
    let has_std = |target: &str| rustup_has(target) || Toolchain::with_source().is_some();
    if !has_std(AARCH64) || !has_std(&musl()) {
        missing.extend(toolchain::SOURCE_PACKAGES.iter().map(|name| (*name, "std for other machines")));
    }
    if run::find_program("musl-gcc").is_none() {
        missing.push(("musl-tools", "the static release"));
    }
    // On an aarch64 machine that is the ordinary gcc.
    if ARCH != "aarch64" {
        let why = "C code for aarch64";
        if run::find_program("aarch64-linux-gnu-gcc").is_none() {
            missing.push(("gcc-aarch64-linux-gnu", why));
        }
        if !Path::new("/usr/aarch64-linux-gnu/include/stdio.h").is_file() {
            missing.push(("libc6-dev-arm64-cross", why));
        }
    }
    missing
}

/// `cargo xtask check-aarch64`: everything in the workspace and the kernel plane, as on such a machine; nothing is linked.
///
/// # Errors
/// If a compiler is missing or something does not compile.
pub fn check_aarch64() -> Result<()> {
    let compiler = Compiler::find(AARCH64)?;
    println!("check-aarch64: with {compiler}");
    let mut cargo = compiler.cargo("check");
    cargo.args(["--locked", "--workspace", "--all-targets", "--profile", PROFILE]);
    run::run(cargo.arg("--target-dir").arg(folder()))?;
    build_ebpf::check("aarch64")
}

/// A compiler for one other target.
pub struct Compiler {
    target: String,
    std: Std,
}

/// Where `std` comes from.
enum Std {
    /// Compiled, from rustup or the distribution.
    Compiled,
    /// This compiler builds it.
    Source(Toolchain),
}

impl Compiler {
    /// For `target`, by what this machine has.
    ///
    /// # Errors
    /// One sentence: what is missing, and the cure.
    pub fn find(target: &str) -> Result<Self> {
        let gcc = if target == AARCH64 { "aarch64-linux-gnu-gcc" } else { "musl-gcc" };
        ensure!(run::find_program(gcc).is_some(), "no C compiler for {target} ({gcc}); {CURE}");
        let std = if rustup_has(target) {
            Std::Compiled
        } else {
            let toolchain = Toolchain::with_source().with_context(|| {
                format!("no Rust compiler with `std` for {target}, or with Rust's source; {CURE}")
            })?;
            Std::Source(toolchain)
        };
        Ok(Self { target: target.to_owned(), std })
    }

    /// A `cargo COMMAND` for the target; arguments may be added.
    pub fn cargo(&self, subcommand: &str) -> Command {
        match &self.std {
            Std::Compiled => {
                let mut command = run::cargo();
                command.args([subcommand, "--target", &self.target]);
                command
            }
            Std::Source(toolchain) => toolchain.cargo_std(subcommand, &self.target),
        }
    }

    /// The folder of Rust's own source, if `std` is built from it.
    pub fn source(&self) -> Option<PathBuf> {
        match &self.std {
            Std::Compiled => None,
            Std::Source(toolchain) => toolchain.source(),
        }
    }

    /// What rustc must be told to link against musl; nothing where rustup's `std` brings its own copy.
    ///
    /// # Errors
    /// If musl or GCC's runtime is not where Debian puts it, or the unwinder cannot be put together.
    pub fn musl_flags(&self) -> Result<Vec<String>> {
        if matches!(self.std, Std::Compiled) {
            return Ok(Vec::new());
        }
        let musl = PathBuf::from(format!("/usr/lib/{ARCH}-linux-musl"));
        ensure!(musl.join("rcrt1.o").is_file(), "no musl in {}; {CURE}", musl.display());
        let gcc = file_of_gcc("crtbeginS.o")?;
        let gcc = gcc.parent().context("GCC's runtime is in no folder")?;
        let unwinder = unwinder()?;
        let mut flags: Vec<_> =
            [&musl, gcc, &unwinder].map(|folder| format!("-Lnative={}", folder.display())).into();
        // rustc names the start files itself, the position-independent ones: musl-gcc knows no -static-pie.
        flags.extend(["-Clink-self-contained=yes".to_owned(), "-Clinker=gcc".to_owned()]);
        Ok(flags)
    }
}

impl std::fmt::Display for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.std {
            Std::Compiled => write!(f, "the installed std for {}", self.target),
            Std::Source(toolchain) => write!(f, "std built by {toolchain}"),
        }
    }
}

fn rustup_has(target: &str) -> bool {
    run::output(run::command("rustc").args(["--print", "target-libdir", "--target", target]))
        .is_some_and(|folder| toolchain::has_library(&folder, "libstd-"))
}

/// A folder with `libunwind.a`, the name that `std` asks for on musl: GCC's unwinder and what it misses in musl.
///
/// Its name depends on the content, because cargo does not look at libraries to see whether it must link again. It is
/// relative to the workspace where that can be, so that the flags are the same in every checkout.
fn unwinder() -> Result<PathBuf> {
    const MISSING: &str = include_str!("portable/unwinder.c");
    let whole = file_of_gcc("libgcc_eh.a")?;
    let bytes = std::fs::read(&whole).with_context(|| format!("cannot read {}", whole.display()))?;
    let mut hash = std::hash::DefaultHasher::new();
    (MISSING, &bytes).hash(&mut hash);
    let folder = folder().join(format!("unwinder-{:016x}", hash.finish()));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;

    let (source, object, library) =
        (folder.join("unwinder.c"), folder.join("unwinder.o"), folder.join("libunwind.a"));
    std::fs::write(&source, MISSING).with_context(|| format!("cannot write {}", source.display()))?;
    let mut gcc = run::command("gcc");
    gcc.args(["-O2", "-fPIC", "-fno-stack-protector", "-Wall", "-Werror", "-c"]);
    run::run(gcc.arg(&source).arg("-o").arg(&object))?;
    std::fs::write(&library, bytes).with_context(|| format!("cannot write {}", library.display()))?;
    run::run(run::command("ar").arg("rsD").arg(&library).arg(&object))?;
    Ok(folder.strip_prefix(run::root()).map_or(folder.clone(), Path::to_path_buf))
}

/// A file of GCC's own, by its name.
fn file_of_gcc(name: &str) -> Result<PathBuf> {
    let path = run::output(run::command("gcc").arg(format!("-print-file-name={name}")))
        .map(PathBuf::from)
        // GCC answers with the bare name if it has no such file.
        .filter(|path| path.is_absolute());
    path.with_context(|| format!("gcc has no {name}"))
}

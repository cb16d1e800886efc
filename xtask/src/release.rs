//! `cargo xtask release`: one static file that runs on any Linux of this architecture, and its debug information apart.
//!
//! Static against musl, position-independent, with the kernel plane embedded. Paths of this machine are mapped to names,
//! so that two checkouts of one commit give the same bytes with the same compilers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build_ebpf, elf,
    portable::{self, Compiler},
    run,
};

/// Arguments of `cargo xtask release`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Arguments {
    /// Without optimisation: only whether it builds and starts.
    #[arg(long)]
    quick: bool,
}

/// As CI wants it.
pub const QUICK: Arguments = Arguments { quick: true };

const NAME: &str = "firezone-gateway";
/// Shows that a panic can be caught, which depends on what was linked.
const UNWINDS: &str = "unwinds";

/// Builds it, checks it, and says where it is; the result is its path.
///
/// # Errors
/// If something is missing, does not build, or the result is not what it must be.
pub fn build(arguments: Arguments) -> Result<PathBuf> {
    let target = portable::musl();
    let compiler = Compiler::find(&target)?;
    println!("release: for {target} with {compiler}");
    let object = build_ebpf::build(false)?;
    let profile = if arguments.quick { portable::PROFILE } else { "release" };
    compile(&compiler, &target, profile)?;

    let built = portable::folder().join(&target).join(profile);
    let unwinds = run(Command::new(built.join("examples").join(UNWINDS)).env("RUST_BACKTRACE", "1"))?;
    ensure!(unwinds == UNWINDS, "the example {UNWINDS} says {unwinds:?}");

    let folder = run::target().join("dist").join(if arguments.quick { "quick" } else { target.as_str() });
    let file = strip(&built.join(NAME), &folder)?;
    let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let needs = elf::needs(&bytes).with_context(|| format!("cannot tell what {} needs", file.display()))?;
    ensure!(needs.is_empty(), "{} is not static; it needs {}", file.display(), needs.join(" and "));
    let object = fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    ensure!(contains(&bytes, &object), "{} does not hold the kernel plane's object", file.display());
    let version = run(Command::new(&file).arg("--version"))?;
    println!("release: {} ({version}, static, {} bytes)", file.display(), bytes.len());
    Ok(file)
}

fn compile(compiler: &Compiler, target: &str, profile: &str) -> Result<()> {
    let (root, home) = (run::root(), run::cargo_home());
    let mut mapped = vec![(root, "/firezone-gateway"), (home, "/cargo")];
    mapped.extend(compiler.source().map(|source| (fs::canonicalize(&source).unwrap_or(source), "/rust")));
    let mut flags = compiler.musl_flags()?;
    flags.extend(mapped.iter().map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display())));
    let c_flags: Vec<_> =
        mapped.iter().map(|(path, name)| format!("-ffile-prefix-map={}={name}", path.display())).collect();

    let mut cargo = compiler.cargo("build");
    cargo.args([
        "--locked",
        "--profile",
        profile,
        "-p",
        NAME,
        "--bin",
        NAME,
        "-p",
        "xtask",
        "--example",
        UNWINDS,
    ]);
    cargo.arg("--target-dir").arg(portable::folder());
    let of_target = target.replace('-', "_");
    cargo.env(format!("CC_{of_target}"), "musl-gcc");
    cargo.env(format!("CFLAGS_{of_target}"), c_flags.join(" "));
    run::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")))
}

/// Copies the program without what only a debugger wants, and that into `NAME.debug` beside it.
fn strip(built: &Path, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let (file, debug) = (folder.join(NAME), folder.join(format!("{NAME}.debug")));
    let objcopy = || run::command("objcopy");
    run::run(objcopy().arg("--only-keep-debug").arg(built).arg(&debug))?;
    let mut link = std::ffi::OsString::from("--add-gnu-debuglink=");
    link.push(&debug);
    run::run(objcopy().arg("--strip-all").arg(link).arg(built).arg(&file))?;
    Ok(file)
}

/// What it prints, trimmed; started with nothing but what `command` sets.
fn run(command: &mut Command) -> Result<String> {
    let shown = run::show(command);
    let mut clean = Command::new(command.get_program());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    clean.args(command.get_args()).env_clear().envs(variables);
    let output = clean.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{shown}`"))?;
    ensure!(
        output.status.success(),
        "`{shown}` failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    // By its first bytes first: a comparison at every place would take a while in a debug build.
    let Some(first) = part.first_chunk::<16>() else { return false };
    bytes.windows(16).enumerate().any(|(at, window)| window == first && bytes[at..].starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::contains;

    #[test]
    fn part_is_found_wherever_it_is_whole() {
        let part: Vec<u8> = (0..40).collect();
        let with = |before: &[u8], after: &[u8]| [before, &part, after].concat();
        assert!(contains(&with(b"", b""), &part));
        assert!(contains(&with(&part[..20], b"behind"), &part));
        assert!(!contains(&part[..39], &part));
        assert!(!contains(&with(b"", b""), b""), "an empty object is none");
    }
}

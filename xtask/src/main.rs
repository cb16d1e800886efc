//! `cargo xtask`: the only build knowledge of this repository.
//!
//! It depends on none of our crates, so that it builds on a machine that can build nothing else yet. Each subcommand is
//! one file; what a command prints is for a person who watches it.

mod bench;
mod build_ebpf;
mod demo;
mod elf;
mod portable;
mod release;
mod run;
mod setup;
mod tally;
mod test;
mod tidy;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Everything that is done with this repository besides `cargo build`.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what is missing on this machine: BPF toolchain, programs of the test network, cargo tools.
    Setup {
        /// Only say what is missing; exit code 1 if something is.
        #[arg(long)]
        check: bool,
    },
    /// Build the kernel plane into target/bpf/firezone-gateway.o, which the daemon embeds when it is built next.
    BuildEbpf {
        /// With aya-log in the programs. `bpftool prog load` refuses such an object; it is for debugging only.
        #[arg(long)]
        log: bool,
    },
    /// Build the daemon as one static file with the kernel plane in it, and say where it is.
    Release(release::Arguments),
    /// Check that everything compiles for aarch64.
    CheckAarch64,
    /// Run everything that CI runs.
    Test(test::Arguments),
    /// Build everything in release and show a client reaching a LAN through the gateway.
    Demo {
        /// Leave it running until Ctrl-C and print how to enter each namespace.
        #[arg(long)]
        hold: bool,
    },
    /// Measure the gateway beside its peers; writes bench/results.json and the tables in README.md.
    Bench(bench::Arguments),
    /// Check what README.md and ARCHITECTURE.md promise.
    Tidy,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup { check: true } => Ok(setup::check()),
        Command::Setup { check: false } => setup::install().map(|()| ExitCode::SUCCESS),
        Command::BuildEbpf { log } => build_ebpf::build(log).map(|_| ExitCode::SUCCESS),
        Command::Release(arguments) => release::build(arguments).map(|_| ExitCode::SUCCESS),
        Command::CheckAarch64 => portable::check_aarch64().map(|()| ExitCode::SUCCESS),
        Command::Test(arguments) => test::run(&arguments),
        Command::Demo { hold } => demo::run(hold),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Tidy => tidy::run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

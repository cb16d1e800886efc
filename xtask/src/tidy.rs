//! `cargo xtask tidy`: checks what README.md and ARCHITECTURE.md promise, so that they stay true.
//!
//! Each check gives a list of complaints; an empty list is a pass. It reads sources as text, because it may depend on
//! none of our crates.

mod commands;
mod dependencies;
mod docs;
mod maps;
mod sources;

use std::process::ExitCode;

use anyhow::Result;

use crate::tally::Tally;

/// What must hold, and who looks.
type Check = (&'static str, fn() -> Result<Vec<String>>);

const CHECKS: &[Check] = &[
    ("no crate reaches a dependency that it must not have", dependencies::forbidden),
    ("each crate has only the direct dependencies it may have", dependencies::unexpected),
    ("every .rs file says at its top what it is", sources::without_doc),
    ("links and paths in the documents lead to something", docs::dead_links),
    ("every `cargo xtask` command in the documents exists", commands::unknown_subcommands),
    ("the daemon knows the flags and variables in README.md", commands::unknown_options),
    ("the map table in README.md is the list in gateway-common", maps::table_differs),
];

/// The subcommand: exit code 1 if something does not hold.
///
/// # Errors
/// None; a check that cannot run is a failed one.
pub fn run() -> Result<ExitCode> {
    let tally = check();
    println!("{tally}");
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs every check and prints what does not hold; long files are reported and are no failure.
pub fn check() -> Tally {
    let mut tally = Tally::default();
    for (name, complaints) in CHECKS {
        match complaints() {
            Ok(complaints) if complaints.is_empty() => {
                println!("        ok: {name}");
                tally.passed += 1;
            }
            result => {
                println!("        NOT SO: {name}");
                for complaint in result.unwrap_or_else(|error| vec![format!("cannot tell: {error:#}")]) {
                    println!("            {complaint}");
                }
                tally.failed += 1;
            }
        }
    }
    for report in sources::long() {
        println!("        note: {report}");
    }
    tally
}

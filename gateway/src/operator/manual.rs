//! Shell completions and the man page, from the definition of the command line.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::{Shell, generate_to};

use crate::cli::Cli;

const NAME: &str = "firezone-gateway";

/// Writes them into `folder`: `firezone-gateway.bash`, `_firezone-gateway`, `firezone-gateway.fish` and
/// `firezone-gateway*.8`.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn write(folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    let mut written = Vec::new();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let path = generate_to(shell, &mut Cli::command(), NAME, folder);
        written.push(path.with_context(|| format!("Cannot write the completions of {shell}"))?);
    }
    let mut command = without_environment(Cli::command()).name(NAME);
    command.build();
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().collect::<Vec<_>>();
    written.push(page(folder, NAME.to_owned(), command)?);
    for sub in subcommands {
        // clap keeps static names; this process ends in a moment.
        let name = format!("{NAME}-{}", sub.get_name());
        written.push(page(folder, name.clone(), sub.name(&*name.leak()))?);
    }
    Ok(written)
}

/// What somebody's environment says is not for a page.
fn without_environment(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_env_values(true))
}

fn page(folder: &Path, name: String, command: Command) -> Result<PathBuf> {
    let path = folder.join(format!("{name}.8"));
    let mut text = Vec::new();
    let page = clap_mangen::Man::new(command).section("8").title(name.to_uppercase()).date("");
    page.render(&mut text).context("Cannot make the man page")?;
    fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_completions_name_every_command_and_flag_and_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let written = write(folder.path()).unwrap();
        let text = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let bash = text("firezone-gateway.bash");
        let page = text("firezone-gateway.8").replace("\\-", "-");
        for command in ["status", "why", "flows", "top", "bundle", "cleanup"] {
            assert!(bash.contains(command) && page.contains(command), "{command}");
            assert!(text(&format!("firezone-gateway-{command}.8")).starts_with(".ie"), "{command}");
        }
        for arg in Cli::command().get_arguments().filter(|arg| !arg.is_hide_set()) {
            let Some(long) = arg.get_long() else { continue };
            assert!(bash.contains(&format!("--{long}")), "{long}");
            assert!(page.contains(&format!("--{long}")), "{long}");
        }
        assert!(!page.contains("dist-docs"), "a hidden command");
        assert!(written.iter().all(|path| path.exists()));
        let wrong = write(&written[0]).expect_err("a file is no folder");
        assert!(format!("{wrong:#}").contains("Cannot make"), "{wrong:#}");
    }
}

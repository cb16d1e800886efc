//! Properties of every source file that git knows or would add.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::run;

/// Longer files are worth a look.
const LONG: usize = 600;

/// Files that do not begin with a `//!` line.
pub fn without_doc() -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for file in rust_files()? {
        let text = std::fs::read_to_string(run::root().join(&file))?;
        if !begins_with_doc(&text) {
            complaints.push(format!("{} does not begin with `//!`", file.display()));
        }
    }
    Ok(complaints)
}

/// One sentence for each file over [`LONG`] lines.
pub fn long() -> Vec<String> {
    let lines = |file: &PathBuf| {
        std::fs::read_to_string(run::root().join(file)).map_or(0, |text| text.lines().count())
    };
    let files = rust_files().unwrap_or_default();
    files
        .iter()
        .map(|file| (file, lines(file)))
        .filter(|(_, lines)| *lines > LONG)
        .map(|(file, lines)| format!("{} has {lines} lines; is it two files?", file.display()))
        .collect()
}

fn rust_files() -> Result<Vec<PathBuf>> {
    let mut git = run::command("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", "*.rs"]);
    let files = run::output(&mut git).context("git does not list the source files")?;
    let files: Vec<_> =
        files.lines().map(PathBuf::from).filter(|file| run::root().join(file).is_file()).collect();
    ensure!(!files.is_empty(), "git lists no source files");
    Ok(files)
}

fn begins_with_doc(text: &str) -> bool {
    text.lines().next().is_some_and(|line| line.strip_prefix("//!").is_some_and(|doc| !doc.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::begins_with_doc;

    #[test]
    fn the_doc_is_the_first_line_and_says_something() {
        let table = [
            ("//! What this is.\nfn main() {}", true),
            ("//!\n", false),
            ("// What this is.", false),
            ("\n//! What this is.", false),
            ("", false),
        ];
        for (text, expect) in table {
            assert_eq!(begins_with_doc(text), expect, "{text:?}");
        }
    }
}

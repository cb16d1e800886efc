//! Links and paths in the documents.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::run;

/// What a reader is promised something in.
pub const DOCUMENTS: &[&str] = &["README.md", "ARCHITECTURE.md"];
/// A path in backticks is checked if it begins with one of these; other code in backticks is nobody's path.
const FOLDERS: &[&str] = &["gateway/", "gateway-common/", "gateway-ebpf/", "tests/", "xtask/", ".ci/"];

/// Links and paths that lead nowhere.
pub fn dead_links() -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(run::root().join(document))
            .with_context(|| format!("cannot read {document}"))?;
        for target in targets(&text) {
            if !exists(&run::root(), &target) {
                complaints.push(format!("{document} points at {target}, which is not there"));
            }
        }
    }
    Ok(complaints)
}

fn exists(root: &Path, target: &str) -> bool {
    let path = target.split('#').next().unwrap_or_default();
    root.join(path).exists()
}

/// Everything in the text that names a file of the repository.
fn targets(text: &str) -> Vec<String> {
    let mut targets = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        // Pictures and shell sessions show paths of other places too.
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        let links = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let local =
            links.filter(|link| !link.contains("://") && !link.starts_with(['#', '<']) && !link.is_empty());
        targets.extend(local.map(str::to_owned));
        let code = line.split('`').skip(1).step_by(2);
        let paths = code.filter(|code| FOLDERS.iter().any(|folder| code.starts_with(folder)));
        // Patterns and commands are no paths.
        targets.extend(paths.filter(|path| !path.contains(['*', '<', '{', ' '])).map(str::to_owned));
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_paths_are_found_and_other_things_are_not() {
        let text = "See [the design](ARCHITECTURE.md#planes) and [aya](https://aya-rs.dev), [below](#below).\n\
                    `gateway/src/bpf.rs` loads, `gateway/src/*.rs` is a pattern, `cargo xtask` a command.\n\
                    ```\n[x](nowhere) `tests/nowhere.rs`\n```\n";
        assert_eq!(targets(text), ["ARCHITECTURE.md#planes", "gateway/src/bpf.rs"]);
    }

    #[test]
    fn a_heading_is_no_part_of_the_path() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(exists(here, "Cargo.toml#dependencies"));
        assert!(!exists(here, "no-such-file"));
    }
}

//! What README.md shows of the daemon's commands is what a scenario has seen.
//!
//! `GATEWAY_TESTS_CAPTURE=1` writes it there. Without it, what README.md shows must still have the labels that there are:
//! the words before each line's first colon.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

/// `text` is what the command of this name has said.
///
/// # Errors
/// If README.md has no such section, or shows something else.
pub(super) fn shown_in_readme(name: &str, text: &str) -> Result<()> {
    let readme = std::fs::read_to_string(README).with_context(|| format!("cannot read {README}"))?;
    let (before, shown, after) =
        section(&readme, name).with_context(|| format!("README.md has no place for `{name}`"))?;
    if std::env::var_os("GATEWAY_TESTS_CAPTURE").is_some() {
        let text = without_gaps(text.trim_end());
        return Ok(std::fs::write(README, format!("{before}```text\n{text}\n```\n{after}"))?);
    }
    let (ours, theirs) = (labels(text), labels(shown));
    let differ: Vec<_> = ours.symmetric_difference(&theirs).collect();
    ensure!(
        differ.is_empty(),
        "README.md and `{name}` differ in {differ:?}; GATEWAY_TESTS_CAPTURE=1 writes README.md"
    );
    Ok(())
}

/// One empty line is enough, also of a screen.
fn without_gaps(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.dedup_by(|a, b| a.is_empty() && b.is_empty());
    lines.join("\n")
}

/// Before, inside and after the markers.
fn section<'a>(readme: &'a str, name: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let begin = format!("<!-- written by the scenario of `{name}`: begin -->\n");
    let end = format!("<!-- written by the scenario of `{name}`: end -->");
    let at = readme.find(&begin)? + begin.len();
    let to = at + readme[at..].find(&end)?;
    Some((&readme[..at], &readme[at..to], &readme[to..]))
}

/// Without numbers, what depends on the kernel, and rows of tables: their ids are cut by a tilde.
fn labels(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let labels = lines.map(|(label, _)| label.trim().replace(|c: char| c.is_ascii_digit(), ""));
    labels
        .filter(|label| !label.starts_with("without ") && !label.contains('~') && label.len() < 40)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_found_by_its_name() {
        let readme = "a\n<!-- written by the scenario of `x y`: begin -->\nb\n<!-- written by the scenario of `x y`: end -->\nc";
        let (before, inside, after) = section(readme, "x y").unwrap();
        assert!(before.ends_with("begin -->\n") && inside == "b\n" && after.starts_with("<!--"), "{readme}");
        assert!(section(readme, "x").is_none());
    }

    #[test]
    fn labels_are_the_words_before_colons() {
        let text = "gateway: a\n  worker 0: b\n  worker 1: c\n    without tun-uso: d\nno label\nab12~ direct [::1]:1\n";
        assert_eq!(labels(text), BTreeSet::from(["gateway".to_owned(), "worker ".to_owned()]));
    }

    #[test]
    fn gaps_are_one_line() {
        assert_eq!(without_gaps("a\n\n\n\nb\nb\n\nc"), "a\n\nb\nb\n\nc");
    }

    #[test]
    fn readme_has_a_place_for_each() {
        let readme = std::fs::read_to_string(README).unwrap();
        for name in ["firezone-gateway status", "firezone-gateway top"] {
            assert!(section(&readme, name).is_some(), "{name}");
        }
    }
}

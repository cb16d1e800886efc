//! The program `nft`: it is given a script, or asked what there is.
//!
//! Why the program and no library: what speaks nftables' netlink in Rust is GPL (`rustables`) or needs C libraries on the
//! target machine (`nftnl`). The crate `nftables` starts the same program, and refuses a whole listing for one statement that
//! its schema does not know; of foreign rulesets we must read what we know and step over the rest. What remains is a fixed
//! script of a page, which an operator can read as it stands, and a look into JSON. A script is one transaction: all of it is
//! done, or nothing.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

/// How long a program may take; it is killed then. Rulesets of ten thousands of rules are listed in less than a second.
const LIMIT: Duration = Duration::from_secs(5);

/// Why a program did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not installed.
    #[error("the program `{0}` is not installed")]
    Missing(String),
    /// It has not the right: children have CAP_NET_ADMIN only as root, or where it is an ambient capability.
    #[error(
        "`{0}` is not permitted to; give CAP_NET_ADMIN as an ambient capability (AmbientCapabilities= in a unit, setpriv \
         --ambient-caps), or run as root"
    )]
    NotPermitted(String),
    /// Something else, in its own words.
    #[error("`{0}` says: {1}")]
    Said(String, String),
    /// It did not end in time.
    #[error("`{0}` did not end within {LIMIT:?}")]
    Hangs(String),
}

impl Error {
    /// What was asked for does not exist.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Said(_, text) if text.contains("No such file or directory"))
    }
}

/// Carries out `script`, or nothing of it.
///
/// # Errors
/// With what `nft` said.
pub async fn apply(script: &str) -> Result<(), Error> {
    run("nft", &["-f", "-"], script).await.map(drop)
}

/// The objects of one table (`"inet name"`) or, without one, of all; the elements of named sets are left out.
///
/// # Errors
/// With what `nft` said; [`Error::is_absence`] if there is no such table.
pub async fn list(table: Option<&str>) -> Result<Vec<Value>, Error> {
    let mut arguments = vec!["-j", "-t", "list"];
    match table {
        Some(table) => arguments.extend(["table"].into_iter().chain(table.split(' '))),
        None => arguments.push("ruleset"),
    }
    let text = run("nft", &arguments, "").await?;
    // A large ruleset takes longer than the control thread may be away.
    let parsed = tokio::task::spawn_blocking(move || objects(&text)).await;
    let unreadable = || Error::Said("nft".to_owned(), "something that is no list of objects".to_owned());
    parsed.ok().flatten().ok_or_else(unreadable)
}

fn objects(text: &str) -> Option<Vec<Value>> {
    // An empty ruleset is an empty text for some versions.
    if text.trim().is_empty() {
        return Some(Vec::new());
    }
    let mut all: Value = serde_json::from_str(text).ok()?;
    match all.get_mut("nftables").map(Value::take) {
        Some(Value::Array(objects)) => Some(objects),
        _ => None,
    }
}

/// Runs `program` with `input`; returns what it printed.
///
/// # Errors
/// If it is missing, fails or hangs.
pub async fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, Error> {
    let path = find(program).ok_or_else(|| Error::Missing(program.to_owned()))?;
    let said = |text: &str| Error::Said(program.to_owned(), text.to_owned());
    let work = async {
        // A clean environment: ours holds the token.
        let mut child = Command::new(path)
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| match e.kind() {
                ErrorKind::NotFound => Error::Missing(program.to_owned()),
                ErrorKind::PermissionDenied => Error::NotPermitted(program.to_owned()),
                _ => said(&e.to_string()),
            })?;
        if let Some(mut stdin) = child.stdin.take() {
            // Whoever closes it early says why on the other side.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await.map_err(|e| said(&e.to_string()))
    };
    let output = tokio::time::timeout(LIMIT, work).await.map_err(|_| Error::Hangs(program.to_owned()))??;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    if words.contains("Operation not permitted") || words.contains("Permission denied") {
        return Err(Error::NotPermitted(program.to_owned()));
    }
    Err(said(essence(&words)))
}

/// Where `program` is: in PATH, or where system programs are, which a service's PATH may lack.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|folder| folder.join(program))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file()
}

/// The first line that says what is wrong; the rest repeats the script.
fn essence(words: &str) -> &str {
    let mut lines = words.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let line = lines.next().unwrap_or("nothing, and fails");
    // `/dev/stdin:3:5-9: Error: ...`
    line.split_once("Error: ").map_or(line, |(_, text)| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_line_of_a_complaint_is_its_essence() {
        let table = [
            ("/dev/stdin:2:4-7: Error: syntax error, unexpected }\n }\n ^\n", "syntax error, unexpected }"),
            ("# Warning: table ip filter is managed by iptables-nft\nError: Boom\n", "Boom"),
            (
                "iptables: Bad rule (does a matching rule exist?).\n",
                "iptables: Bad rule (does a matching rule exist?).",
            ),
            ("", "nothing, and fails"),
        ];
        for (words, expect) in table {
            assert_eq!(essence(words), expect);
        }
    }

    #[test]
    fn only_a_list_of_objects_is_a_listing() {
        let table = [
            ("", Some(0)),
            (r#"{"nftables": []}"#, Some(0)),
            (
                r#"{"nftables": [{"metainfo": {"json_schema_version": 1}}, {"table": {"name": "x"}}]}"#,
                Some(2),
            ),
            (r#"{"nftables": {}}"#, None),
            (r#"{"tables": []}"#, None),
            ("[]", None),
            ("table inet x {\n}\n", None),
        ];
        for (text, expect) in table {
            assert_eq!(objects(text).map(|objects| objects.len()), expect, "{text}");
        }
    }

    #[tokio::test]
    async fn what_goes_wrong_has_a_name() {
        let missing = run("no-such-program-here", &[], "").await.unwrap_err();
        assert!(matches!(&missing, Error::Missing(name) if name == "no-such-program-here"), "{missing}");
        let fails =
            run("sh", &["-c", "echo 'Error: No such file or directory' >&2; exit 1"], "").await.unwrap_err();
        assert!(fails.is_absence(), "{fails}");
        let forbidden = run("sh", &["-c", "echo Operation not permitted >&2; exit 1"], "").await.unwrap_err();
        assert!(matches!(forbidden, Error::NotPermitted(_)), "{forbidden}");
    }

    #[tokio::test]
    async fn programs_do_not_inherit_our_environment() {
        let environment = run("sh", &["-c", "export -p; cat"], "and the input").await.unwrap();
        assert!(environment.contains("and the input"), "{environment}");
        assert!(!environment.contains("CARGO"), "{environment}");
    }
}

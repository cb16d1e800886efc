//! The map table in README.md against the one list in `gateway-common/src/maps.rs`.

use std::fmt;

use anyhow::{Context as _, Result, ensure};

use crate::run;

const LIST: &str = "gateway-common/src/maps.rs";

/// One map, as both places write it.
#[derive(Debug, PartialEq, Eq)]
struct Map {
    name: String,
    kind: String,
    key: String,
    value: String,
}

impl fmt::Display for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| `{}` | `{}` | `{}` | `{}` | ... |", self.name, self.kind, self.key, self.value)
    }
}

/// Rows that are in one of the two places only.
pub fn table_differs() -> Result<Vec<String>> {
    let read = |file: &str| {
        std::fs::read_to_string(run::root().join(file)).with_context(|| format!("cannot read {file}"))
    };
    let list = listed(&read(LIST)?);
    ensure!(!list.is_empty(), "no map found in {LIST}");
    let table = tabled(&read("README.md")?);
    let missing = list.iter().filter(|map| !table.contains(map));
    let stale = table.iter().filter(|map| !list.contains(map));
    let missing = missing.map(|map| format!("README.md lacks the row {map}"));
    Ok(missing.chain(stale.map(|map| format!("{LIST} lacks {map}, which README.md has"))).collect())
}

/// Entries of the list: `NAME: Kind<key, value>[capacity];`.
fn listed(source: &str) -> Vec<Map> {
    let start = source.find("$then! {").unwrap_or(source.len());
    let body = &source[start..];
    let body =
        &body[..body.find("};").unwrap_or(body.len()).min(body.find("        }\n").unwrap_or(body.len()))];
    let entries = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    entries.filter_map(entry).collect()
}

fn entry(line: &str) -> Option<Map> {
    let (name, rest) = line.split_once(": ")?;
    let (kind, rest) = rest.split_once('<')?;
    let (types, _capacity) = rest.split_once(">[")?;
    let (key, value) = types.split_once(", ")?;
    let last = |path: &str| path.rsplit("::").next().unwrap_or(path).to_owned();
    Some(Map { name: name.to_owned(), kind: kind.to_owned(), key: last(key), value: last(value) })
}

/// Rows of the table whose header row begins with `| map | kind | key | value |`.
fn tabled(readme: &str) -> Vec<Map> {
    let lines = readme.lines().skip_while(|line| !line.starts_with("| map | kind | key | value |")).skip(2);
    let rows = lines.take_while(|line| line.starts_with('|'));
    rows.filter_map(|row| {
        let mut cells = row.split('|').skip(1).map(|cell| cell.trim().trim_matches('`').to_owned());
        Some(Map { name: cells.next()?, kind: cells.next()?, key: cells.next()?, value: cells.next()? })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "macro_rules! maps {\n    ($then:ident) => {\n        $then! {\n            /// Doc: of<a, b>[c].\n            \
        COUNTERS: PerCpuArray<u32, $crate::maps::FrameCount>[$crate::FrameKind::COUNT];\n        }\n    };\n}\n\
        pub const X: Y<u8, u8>[1];\n";
    const README: &str = "# x\n\n| map | kind | key | value | holds |\n|---|---|---|---|---|\n\
        | `COUNTERS` | `PerCpuArray` | `u32` | `FrameCount` | frames |\n\ntext | `OTHER` |\n";

    #[test]
    fn list_and_table_are_read_alike() {
        let map = Map {
            name: "COUNTERS".into(),
            kind: "PerCpuArray".into(),
            key: "u32".into(),
            value: "FrameCount".into(),
        };
        assert_eq!(listed(SOURCE), [map]);
        assert_eq!(listed(SOURCE), tabled(README));
    }

    #[test]
    fn the_real_list_can_be_read() {
        let source = std::fs::read_to_string(run::root().join(LIST)).unwrap();
        assert!(listed(&source).iter().any(|map| map.name == "COUNTERS"));
    }
}

//! Does an ELF file need anything at run time? Just enough of the format for that.

use anyhow::{Context as _, Result, ensure};

const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
const DT_NEEDED: u64 = 1;

/// What the file cannot start without, one phrase each; empty if it is static.
///
/// # Errors
/// If it is no 64-bit little-endian ELF file, or is cut short.
pub fn needs(file: &[u8]) -> Result<Vec<String>> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "it is no 64-bit little-endian ELF file");
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let (headers, size, count) = (number(file, 32, 8)?, number(file, 54, 2)?, number(file, 56, 2)?);
    ensure!(count > 0, "it has no program headers");
    let mut needs = Vec::new();
    for header in (0..count).map(|i| headers.saturating_add(i * size)) {
        // Elf64_Phdr: p_type at 0, p_offset at 8, p_filesz at 32.
        let field = |at: u64, bytes| number(file, header.saturating_add(at), bytes);
        let kind = field(0, 4)?;
        if kind != PT_INTERP && kind != PT_DYNAMIC {
            continue;
        }
        let content = part(file, field(8, 8)?, field(32, 8)?)?;
        if kind == PT_INTERP {
            let path = String::from_utf8_lossy(content);
            needs.push(format!("the interpreter {}", path.trim_end_matches('\0')));
        } else {
            // Elf64_Dyn: d_tag at 0; the rest is of no interest.
            let tags = content.chunks_exact(16).map(|entry| number(entry, 0, 8).unwrap_or(0));
            match tags.filter(|tag| *tag == DT_NEEDED).count() {
                0 => {}
                libraries => needs.push(format!("{libraries} shared libraries")),
            }
        }
    }
    Ok(needs)
}

/// A little-endian number of up to 8 bytes.
fn number(file: &[u8], at: u64, bytes: u64) -> Result<u64> {
    let bytes = part(file, at, bytes)?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn part(file: &[u8], at: u64, bytes: u64) -> Result<&[u8]> {
    let range = || Some(usize::try_from(at).ok()?..usize::try_from(at.checked_add(bytes)?).ok()?);
    range().and_then(|range| file.get(range)).context("it is cut short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_dynamic() {
        let me = std::fs::read("/proc/self/exe").unwrap();
        let needs = needs(&me).unwrap();
        assert_eq!(needs.len(), 2, "{needs:?}");
        assert!(needs[0].starts_with("the interpreter /lib"), "{needs:?}");
        assert!(needs[1].ends_with(" shared libraries"), "{needs:?}");
    }

    #[test]
    fn file_without_interpreter_and_libraries_needs_nothing() {
        assert_eq!(needs(&elf(PT_DYNAMIC, &[5, 6, 0])).unwrap(), Vec::<String>::new());
        assert_eq!(needs(&elf(PT_DYNAMIC, &[5, DT_NEEDED, DT_NEEDED, 0])).unwrap(), ["2 shared libraries"]);
    }

    #[test]
    fn no_elf_file_and_one_that_is_cut_short_are_errors() {
        assert!(needs(b"#!/bin/sh").is_err());
        let whole = elf(PT_DYNAMIC, &[DT_NEEDED]);
        for len in 0..whole.len() {
            assert!(needs(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    /// One program header, and dynamic entries with these tags behind it.
    fn elf(kind: u64, tags: &[u64]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        let mut put = |at: usize, number: u64, bytes: usize| {
            file[at..at + bytes].copy_from_slice(&number.to_le_bytes()[..bytes]);
        };
        put(0, u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"), 8);
        put(32, 64, 8);
        put(54, 56, 2);
        put(56, 1, 2);
        put(64, kind, 4);
        put(64 + 8, 64 + 56, 8);
        put(64 + 32, 16 * tags.len() as u64, 8);
        for tag in tags {
            file.extend(tag.to_le_bytes());
            file.extend([0; 8]);
        }
        file
    }
}

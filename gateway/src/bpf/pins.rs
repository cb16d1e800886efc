//! The maps' names in a bpffs, for `bpftool map dump pinned`. Nothing is read back from there: every start makes fresh maps
//! and puts them in place of what an earlier one left. Links are never pinned, so nothing outlives the daemon but names.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use gateway_common::maps;

use super::KernelPlane;

/// linux/magic.h
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The pinned maps of one plane; the names are gone when this is dropped. Of two daemons with one folder the later one's
/// names are there, until either ends.
#[derive(Debug)]
pub struct Pins {
    folder: PathBuf,
}

impl Pins {
    /// Pins every map of the list under its name in `folder`, which is made if its parent is there, and readable for root
    /// only. Stale names of the list are replaced; other files are left alone.
    ///
    /// # Errors
    /// One sentence: no bpffs there, or no right to write to it. No map of the list is pinned then, and the plane works
    /// all the same.
    pub fn make(plane: &KernelPlane, folder: &Path) -> Result<Self> {
        let made = fs::DirBuilder::new().mode(0o700).create(folder);
        match made {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(e)
                    .with_context(|| format!("cannot make the folder {} for the maps", folder.display()));
            }
            _ => {}
        }
        let kind = rustix::fs::statfs(folder)
            .with_context(|| format!("cannot look at the folder {} for the maps", folder.display()))?;
        #[expect(clippy::cast_sign_loss, reason = "a magic number, not a count")]
        let magic = kind.f_type as u64 & 0xffff_ffff;
        ensure!(
            magic == BPF_FS_MAGIC,
            "{} is not in a bpffs; mount one (`mount -t bpf bpf /sys/fs/bpf`) or name another folder with --bpffs",
            folder.display()
        );
        // From here on what is pinned is removed again, also when a later map fails.
        let pins = Self { folder: folder.to_owned() };
        for spec in maps::ALL {
            let path = folder.join(spec.name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("cannot replace {}", path.display()));
                }
                _ => {}
            }
            let map = plane.ebpf.map(spec.name).with_context(|| format!("the map {} is gone", spec.name))?;
            map.pin(&path).with_context(|| format!("cannot pin a map as {}", path.display()))?;
        }
        Ok(pins)
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for spec in maps::ALL {
            // One that was never made, or that somebody removed, cannot be removed.
            let _gone = fs::remove_file(self.folder.join(spec.name));
        }
        // Not empty: somebody else's files are in it.
        let _not_empty = fs::remove_dir(&self.folder);
    }
}

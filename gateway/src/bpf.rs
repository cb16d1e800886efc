//! The kernel plane's programs as the daemon sees them: the embedded object, loading it, attaching it, its counters.
//!
//! It spells no map's name, type or size: those are in `gateway_common::maps`, and [`KernelPlane::load`] compares what
//! the object made with that list. It decides nothing about interfaces or modes.

#[cfg(test)]
mod tests;

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{Array, MapData, MapType, PerCpuArray},
    programs::{Xdp, XdpMode},
};
use gateway_common::{
    FrameCount, FrameKind,
    maps::{self, MapKind, MapSpec},
};

#[cfg(bpf_object)]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/firezone-gateway.o"));

/// The embedded object; `None` if the daemon was built without one.
#[must_use]
pub fn built_in() -> Option<&'static [u8]> {
    #[cfg(bpf_object)]
    return Some(OBJECT);
    #[cfg(not(bpf_object))]
    None
}

/// One sentence for the log: with or without the kernel programs, and the cure.
#[must_use]
pub fn describe() -> String {
    match built_in() {
        Some(object) => {
            let (kib, abi) = (object.len().div_ceil(1024), maps::ABI_VERSION);
            format!("built with the fast path's kernel programs ({kib} KiB, ABI {abi})")
        }
        None => "built without the fast path's kernel programs; to have them, run `cargo xtask build-ebpf` and build again"
            .to_owned(),
    }
}

/// The loaded kernel plane. Dropping it detaches its programs and frees its maps.
#[derive(Debug)]
pub struct KernelPlane {
    ebpf: Ebpf,
}

#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only the BPF object test loads it until a fast path attaches it")
)]
impl KernelPlane {
    /// Loads `object` into the kernel. Nothing is attached or pinned yet.
    ///
    /// # Errors
    /// If the object was built for another contract than this daemon, or the kernel refuses it (no CAP_BPF, verifier).
    pub fn load(object: &[u8]) -> Result<Self> {
        let mut ebpf = Ebpf::load(object).context("the kernel does not take the BPF object")?;
        let abi = {
            let map = ebpf
                .map(maps::ABI_SECTION)
                .context("the BPF object does not say for which ABI it was built")?;
            Array::<_, u32>::try_from(map)?.get(&0, 0)?
        };
        ensure!(
            abi == maps::ABI_VERSION,
            "the BPF object has ABI {abi}, this daemon {}; build both from the same source",
            maps::ABI_VERSION
        );
        for spec in maps::ALL {
            compare(&ebpf, spec)?;
        }
        uplink(&mut ebpf)?.load().context("the verifier refuses the program uplink")?;
        Ok(Self { ebpf })
    }

    /// Attaches `uplink` to an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// If there is no such interface, or its driver does not take a program in this mode.
    pub fn attach(&mut self, interface: &str, mode: XdpMode) -> Result<()> {
        uplink(&mut self.ebpf)?
            .attach(interface, mode)
            .with_context(|| format!("cannot attach the program uplink to {interface} ({mode:?})"))?;
        Ok(())
    }

    /// Frames seen so far, by kind, summed over the CPUs.
    ///
    /// # Errors
    /// If the kernel does not let the map be read.
    pub fn frame_counts(&self) -> Result<Vec<(FrameKind, FrameCount)>> {
        let map = self.ebpf.map(maps::COUNTERS.name).context("the map of counters is gone")?;
        // aya's Pod is not ours to implement for FrameCount; the two words are cast instead.
        let map = PerCpuArray::<&MapData, [u64; size_of::<FrameCount>() / 8]>::try_from(map)?;
        let mut counts = Vec::with_capacity(FrameKind::COUNT);
        for (index, kind) in (0..).zip(FrameKind::ALL) {
            let mut sum = FrameCount::default();
            for words in map.get(&index, 0)?.iter() {
                let one: FrameCount = bytemuck::cast(*words);
                sum.packets += one.packets;
                sum.bytes += one.bytes;
            }
            counts.push((*kind, sum));
        }
        Ok(counts)
    }
}

fn uplink(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut("uplink").context("the BPF object has no program uplink")?.try_into()?)
}

/// The map that the object made must be the one in the list.
fn compare(ebpf: &Ebpf, spec: &MapSpec) -> Result<()> {
    let name = spec.name;
    let map = ebpf.map(name).with_context(|| format!("the BPF object has no map {name}"))?;
    let (data, kind) = match map {
        aya::maps::Map::PerCpuArray(data) => (data, MapKind::PerCpuArray),
        other => bail!("the map {name} is of an unexpected kind: {other:?}"),
    };
    let info = data.info()?;
    let found = MapSpec {
        name,
        kind,
        key_size: info.key_size(),
        value_size: info.value_size(),
        capacity: info.max_entries(),
    };
    ensure!(
        found == *spec,
        "the map {name} is not what the list says: {found:?} in the object, {spec:?} in the list"
    );
    ensure!(info.map_type()? == map_type(kind), "the kernel made the map {name} as {:?}", info.map_type()?);
    Ok(())
}

fn map_type(kind: MapKind) -> MapType {
    match kind {
        MapKind::PerCpuArray => MapType::PerCpuArray,
    }
}

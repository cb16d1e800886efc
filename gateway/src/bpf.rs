//! The kernel plane's programs as the daemon sees them: the embedded object, loading it, what its maps must be.
//!
//! It spells no map's name, type or size: those are in `gateway_common::maps`, and [`KernelPlane::open`] compares what
//! the object made with that list. It decides nothing about interfaces or modes.

mod pins;
mod steering;
#[cfg(test)]
mod tests;
mod tun_ioctl;
mod uplink;

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{Array, Map, MapType},
};
use gateway_common::maps::{self, MapKind, MapSpec};

pub use steering::{LeftOut, Steering};
#[cfg(test)]
use uplink::Uplink;

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

#[cfg(bpf_object)]
static STEERING: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/firezone-steering.o"));

/// The same without XDP, and without the maps that only CAP_NET_ADMIN may make.
fn built_in_steering() -> Option<&'static [u8]> {
    #[cfg(bpf_object)]
    return Some(STEERING);
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

/// The object in the kernel: its maps, and those of its programs that were asked for. Dropping it closes both; what is
/// attached to a socket or a device stays there as long as that.
#[derive(Debug)]
pub struct KernelPlane {
    ebpf: Ebpf,
}

impl KernelPlane {
    /// Makes the object's maps, empty and not pinned. No program is loaded yet.
    ///
    /// # Errors
    /// If the object was built for another contract than this daemon, or the kernel does not let maps be made (CAP_BPF).
    pub fn open(object: &[u8]) -> Result<Self> {
        let ebpf = Ebpf::load(object).context("the kernel does not take the BPF object")?;
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
            // The object of the steering programs has none; `uplink` of the other one is what needs it.
            let left_out = spec.kind == MapKind::XskMap && ebpf.program("uplink").is_none();
            if left_out && ebpf.map(spec.name).is_none() {
                continue;
            }
            compare(&ebpf, spec)?;
        }
        Ok(Self { ebpf })
    }
}

/// A map out of the object, for whoever writes to it.
fn take(ebpf: &mut Ebpf, spec: &MapSpec) -> Result<Map> {
    ebpf.take_map(spec.name).with_context(|| format!("the map {} is gone", spec.name))
}

/// The map that the object made must be the one in the list.
fn compare(ebpf: &Ebpf, spec: &MapSpec) -> Result<()> {
    let name = spec.name;
    let map = ebpf.map(name).with_context(|| format!("the BPF object has no map {name}"))?;
    let (data, kind) = match map {
        aya::maps::Map::Array(data) => (data, MapKind::Array),
        aya::maps::Map::XskMap(data) => (data, MapKind::XskMap),
        aya::maps::Map::PerCpuArray(data) => (data, MapKind::PerCpuArray),
        aya::maps::Map::HashMap(data) => (data, MapKind::HashMap),
        aya::maps::Map::ReusePortSockArray(data) => (data, MapKind::ReusePortSockArray),
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
    ensure!(
        info.map_flags() == kind.flags(),
        "the map {name} has the flags {:#x}, not {:#x}",
        info.map_flags(),
        kind.flags()
    );
    ensure!(info.map_type()? == map_type(kind), "the kernel made the map {name} as {:?}", info.map_type()?);
    Ok(())
}

fn map_type(kind: MapKind) -> MapType {
    match kind {
        MapKind::Array => MapType::Array,
        MapKind::XskMap => MapType::XskMap,
        MapKind::PerCpuArray => MapType::PerCpuArray,
        MapKind::HashMap => MapType::Hash,
        MapKind::ReusePortSockArray => MapType::ReuseportSockArray,
    }
}

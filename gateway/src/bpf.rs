//! The kernel plane's programs as the daemon sees them: the embedded object, loading it, what its maps must be.
//!
//! It spells no map's name, type or size: those are in `gateway_common::maps`, and [`KernelPlane::open`] compares what
//! the object made with that list. It decides nothing about interfaces or modes.

mod owners;
mod pins;
mod steering;
#[cfg(test)]
mod tests;
mod tun_ioctl;
mod uplink;

use std::{io, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapType},
};
use gateway_common::maps::{self, MapKind, MapSpec};

pub use owners::{LeftOut, Owners};
pub use pins::Pins;
pub use uplink::Uplink;

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
        Self::open_for(object, None)
    }

    /// The same with room for so many clients; with `None`, for as many as the list says.
    ///
    /// # Errors
    /// As for [`KernelPlane::open`].
    pub fn open_for(object: &[u8], clients: Option<u32>) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        let capacity = |spec: &MapSpec| clients.map_or(spec.capacity, |clients| spec.capacity_for(clients));
        for spec in maps::ALL.iter().filter(|spec| capacity(spec) != spec.capacity) {
            loader.map_max_entries(spec.name, capacity(spec));
        }
        let ebpf = loader.load(object).context("the kernel does not take the BPF object")?;
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
            compare(&ebpf, &MapSpec { capacity: capacity(spec), ..*spec })?;
        }
        Ok(Self { ebpf })
    }
}

/// What of us is in the kernel: one object, its maps once, and their writers.
#[derive(Debug)]
pub struct Kernel {
    /// The programs, for attaching them and for their counters.
    pub plane: KernelPlane,
    /// Whose each client is.
    pub owners: Owners,
    /// The tables of `uplink`; `None` without that program.
    pub uplink: Option<Uplink>,
    /// Removed with it.
    #[cfg_attr(not(test), expect(dead_code, reason = "it lives as long as this"))]
    pins: Option<Pins>,
}

impl Kernel {
    /// Loads the steering programs, with empty maps and attached to nothing. Needs CAP_BPF, no other right.
    ///
    /// # Errors
    /// One sentence: built without the object, no CAP_BPF, or a kernel that does not take the programs.
    pub fn steering() -> Result<Self> {
        let object = built_in_steering().context("built without the kernel programs")?;
        let load = || {
            let mut plane = KernelPlane::open(object)?;
            plane.load_steering()?;
            let owners = Owners::take(&mut plane)?;
            Ok(Self { plane, owners, uplink: None, pins: None })
        };
        load().map_err(name_the_right)
    }

    /// Loads all programs, with empty maps and attached to nothing, `uplink` switched off. The maps have room for so many
    /// `clients`, by default for [`maps::MAX_CLIENTS`], and are pinned in `folder`; if they cannot be, that is said in the
    /// log, and everything works all the same.
    ///
    /// # Errors
    /// As for [`Kernel::steering`]; this needs CAP_NET_ADMIN and CAP_PERFMON too.
    pub fn whole(clients: Option<u32>, folder: Option<&Path>) -> Result<Self> {
        Self::whole_of(built_in().context("built without the kernel programs")?, clients, folder)
            .map_err(name_the_right)
    }

    fn whole_of(object: &[u8], clients: Option<u32>, folder: Option<&Path>) -> Result<Self> {
        let mut plane = KernelPlane::open_for(object, clients)?;
        plane.load_steering()?;
        plane.load_uplink()?;
        let pins = folder.map(|folder| Pins::make(&plane, folder)).and_then(|pins| {
            match &pins {
                Ok(pins) => tracing::debug!("The kernel's maps are pinned in {}", pins.folder().display()),
                Err(e) => tracing::info!("The kernel's maps have no names in a bpffs: {e:#}"),
            }
            pins.ok()
        });
        let owners = Owners::take(&mut plane)?;
        let uplink = Some(Uplink::take(&mut plane)?);
        Ok(Self { plane, owners, uplink, pins })
    }

    /// Where the maps are pinned.
    #[cfg(test)]
    pub fn pinned(&self) -> Option<&Path> {
        self.pins.as_ref().map(Pins::folder)
    }

    /// Switches the decisions of `uplink` on or off, for the very next frame; the program stays attached, because
    /// detaching resets many drivers. It is never on while [`Kernel::must_pass`]. Returns what it is now.
    ///
    /// # Errors
    /// If the kernel does not let the map be written.
    pub fn enable(&mut self, enabled: bool) -> Result<bool> {
        let enabled = enabled && !self.must_pass();
        match &mut self.uplink {
            Some(uplink) => uplink.enable(enabled).map(|()| enabled),
            None => Ok(false),
        }
    }

    /// True if something does not fit into a map whose absence there makes `uplink` drop what a worker would take: it must
    /// be off then. LOCAL and PEERS are none of these: without an entry frames pass, or share the strangers' budget. Once
    /// true it stays so: nobody remembers what was left out.
    #[must_use]
    pub fn must_pass(&self) -> bool {
        self.uplink.as_ref().is_some_and(|uplink| uplink.must_pass() || self.owners.left_out().sessions > 0)
    }

    /// How often a map did not take an entry, by its name.
    pub fn left_out(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let LeftOut { sessions, tunnels } = self.owners.left_out();
        let owners = [(maps::SESSIONS.name, sessions), (maps::TUNNELS.name, tunnels)];
        owners.into_iter().chain(self.uplink.iter().flat_map(Uplink::left_out))
    }
}

/// The kernel says EPERM where a right is missing, not which. The verifier says EACCES: with CAP_PERFMON it lets a program
/// compute with pointers, as `uplink` does for the length of a frame.
fn name_the_right(error: anyhow::Error) -> anyhow::Error {
    let code = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    match code {
        Some(libc::EPERM) => error.context(
            "no BPF rights: grant CAP_BPF (in a container, its seccomp profile must let bpf(2) pass too)",
        ),
        Some(libc::EACCES) => error.context("the kernel's verifier refuses the programs: grant CAP_PERFMON"),
        _ => error,
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

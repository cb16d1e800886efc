//! The maps of the kernel plane: each is described here and nowhere else.
//!
//! [`maps!`](crate::maps!) hands the list to a macro of the caller. `gateway-ebpf` turns an entry into a BTF map of
//! that name; this file turns it into a [`MapSpec`], which the loader and the tests compare with the compiled object.

/// Changed whenever a map, its key or value, or the meaning of one of them changes. The object carries the number in
/// section [`ABI_SECTION`]; the loader refuses another one.
pub const ABI_VERSION: u32 = 1;
/// The read-only section (and map) in which the object keeps its [`ABI_VERSION`], 4 bytes, native order.
pub const ABI_SECTION: &str = ".rodata.abi";

/// How many workers there may be: worker numbers are below it, and maps that hold something per worker have this many
/// entries.
pub const MAX_WORKERS: usize = 64;

/// Calls `$then!` with the list of maps: `/// doc`, `NAME: kind<key, value>[capacity];` each.
///
/// Keys and values are named by their full path, because the list is expanded in other crates.
#[macro_export]
macro_rules! maps {
    ($then:ident) => {
        $then! {
            /// Frames seen on attached interfaces, by [`FrameKind`]($crate::FrameKind), for each CPU.
            COUNTERS: PerCpuArray<u32, $crate::maps::FrameCount>[$crate::FrameKind::COUNT];
        }
    };
}

/// A value of [`COUNTERS`]: what one CPU has seen of one kind of frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct FrameCount {
    /// Frames.
    pub packets: u64,
    /// Bytes of these frames, Ethernet header included.
    pub bytes: u64,
}

const _: () = assert!(size_of::<FrameCount>() == 16 && align_of::<FrameCount>() == 8);

/// The kinds of maps in the list; the names are aya's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray,
}

/// One map of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSpec {
    /// Its name in the object, under the pin directory and in `bpftool`.
    pub name: &'static str,
    /// Its kind.
    pub kind: MapKind,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Number of entries.
    pub capacity: u32,
}

macro_rules! describe {
    ($($(#[$doc:meta])+ $name:ident: $kind:ident<$key:ty, $value:ty>[$capacity:expr];)+) => {
        $(
            $(#[$doc])+
            #[expect(clippy::cast_possible_truncation, reason = "sizes of PODs and capacities are far below 2^32")]
            pub const $name: MapSpec = MapSpec {
                name: stringify!($name),
                kind: MapKind::$kind,
                key_size: size_of::<$key>() as u32,
                value_size: size_of::<$value>() as u32,
                capacity: $capacity as u32,
            };
        )+

        /// Every map, in the order of the list.
        pub const ALL: &[MapSpec] = &[$($name,)+];
    };
}

crate::maps!(describe);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_are_unique() {
        for (i, map) in ALL.iter().enumerate() {
            // BPF_OBJ_NAME_LEN is 16 with the terminating zero.
            assert!(map.name.len() < 16, "{} is cut by the kernel", map.name);
            assert!(map.capacity > 0, "{}", map.name);
            assert!(ALL[i + 1..].iter().all(|b| b.name != map.name));
        }
    }
}

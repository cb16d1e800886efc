//! The maps of `gateway_common::maps!` as BTF maps of the same names. Nothing is described here.

use aya_ebpf::macros::btf_map;

macro_rules! declare {
    ($($(#[$doc:meta])+ $name:ident: $kind:ident<$key:ty, $value:ty>[$capacity:expr];)+) => {
        $(declare!(@$kind $(#[$doc])+ $name, $key, $value, $capacity);)+
    };
    // Keys of arrays are u32, so aya-ebpf does not ask for them.
    (@PerCpuArray $(#[$doc:meta])+ $name:ident, $key:ty, $value:ty, $capacity:expr) => {
        $(#[$doc])+
        #[btf_map]
        pub static $name: aya_ebpf::btf_maps::PerCpuArray<$value, { $capacity }> =
            aya_ebpf::btf_maps::PerCpuArray::new();
    };
    (@Array $(#[$doc:meta])+ $name:ident, $key:ty, $value:ty, $capacity:expr) => {
        $(#[$doc])+
        #[btf_map]
        pub static $name: aya_ebpf::btf_maps::Array<$value, { $capacity }> = aya_ebpf::btf_maps::Array::new();
    };
    (@HashMap $(#[$doc:meta])+ $name:ident, $key:ty, $value:ty, $capacity:expr) => {
        $(#[$doc])+
        #[btf_map]
        pub static $name: aya_ebpf::btf_maps::HashMap<
            $key,
            $value,
            { $capacity },
            { gateway_common::maps::MapKind::HashMap.flags() as usize },
        > = aya_ebpf::btf_maps::HashMap::new();
    };
    // Keys and values of these are u32, a number and a socket.
    (@ReusePortSockArray $(#[$doc:meta])+ $name:ident, $key:ty, $value:ty, $capacity:expr) => {
        $(#[$doc])+
        #[btf_map]
        pub static $name: aya_ebpf::btf_maps::ReusePortSockArray<{ $capacity }> =
            aya_ebpf::btf_maps::ReusePortSockArray::new();
    };
    // The same, with an AF_XDP socket.
    (@XskMap $(#[$doc:meta])+ $name:ident, $key:ty, $value:ty, $capacity:expr) => {
        $(#[$doc])+
        #[cfg(feature = "uplink")]
        #[btf_map]
        pub static $name: aya_ebpf::btf_maps::XskMap<{ $capacity }> = aya_ebpf::btf_maps::XskMap::new();
    };
}

gateway_common::maps!(declare);

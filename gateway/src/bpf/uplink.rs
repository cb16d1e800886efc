//! The XDP program `uplink` and its counters.

#![cfg_attr(
    not(test),
    expect(dead_code, reason = "only the BPF object test attaches it until there is a fast path")
)]

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray},
    programs::{Xdp, XdpMode},
};
use gateway_common::{FrameCount, FrameKind, maps};

use super::KernelPlane;

impl KernelPlane {
    /// Loads `uplink`. It is not attached yet.
    ///
    /// # Errors
    /// If the verifier refuses it, or the process may not load XDP programs (CAP_BPF and CAP_NET_ADMIN).
    pub fn load_uplink(&mut self) -> Result<()> {
        program(&mut self.ebpf)?.load().context("the kernel does not take the program uplink")
    }

    /// Attaches `uplink` to an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// If it is not loaded, there is no such interface, or its driver does not take a program in this mode.
    pub fn attach_uplink(&mut self, interface: &str, mode: XdpMode) -> Result<()> {
        program(&mut self.ebpf)?
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

/// `uplink` in the object.
pub(super) fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut("uplink").context("the BPF object has no program uplink")?.try_into()?)
}

//! One try to use an interface: the program attached, AF_XDP sockets on every queue, each in its slot.
//!
//! ```text
//!   queue 0   socket of worker 0, of worker 1 ...    one ring each, so that a single flow of a relay feeds all of them
//!   queue 1   socket of worker 0, of worker 1 ...
//! ```
//!
//! A queue has [`MAX_SOCKETS`] sockets at most, and fewer if that would take too much memory. With more workers than that,
//! other workers read other queues, and what is for a worker without a socket on a queue goes to one that has: it hands
//! it over.

use std::io;

use aya::programs::{XdpMode, xdp::XdpLinkId};
use gateway_common::maps::MAX_QUEUES;
use gateway_proto::WorkerId;

use crate::data::{
    told::Kernel,
    xsk::{Facts, FastPlace, MAX_SOCKETS, Mode, OpenError, Place, Refusal, Sizes, Socket, Transfer, open},
};

/// Memory for frames on all queues, at most, in bytes; but a queue has one socket at least.
const MAX_MEMORY: usize = 512 << 20;

/// An interface in use, switched off.
pub struct Opened {
    /// The program on it.
    pub link: XdpLinkId,
    /// Each worker's ports.
    pub places: Vec<Vec<FastPlace<Socket>>>,
}

/// Who reads which queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    queues: u32,
    workers: usize,
    /// On each queue.
    sockets: usize,
    sizes: Sizes,
}

impl Plan {
    /// `None` if packets of this MTU fit no frame.
    fn new(queues: u32, workers: usize, mtu: usize) -> Option<Self> {
        let queues = queues.min(u32::try_from(MAX_QUEUES).unwrap_or(u32::MAX));
        let mut sockets = workers.clamp(1, MAX_SOCKETS);
        loop {
            let sizes = Sizes::plan(sockets, mtu)?;
            let bytes = queues as usize * sizes.frames as usize * sizes.frame;
            if bytes <= MAX_MEMORY || sockets == 1 {
                return Some(Self { queues, workers, sockets, sizes });
            }
            sockets -= 1;
        }
    }

    /// Whose socket number `number` of a queue is. Each worker has one at most.
    fn reader(&self, queue: u32, number: usize) -> usize {
        (queue as usize * self.sockets + number) % self.workers
    }

    /// The number of the socket that takes what is for `worker`.
    fn socket_for(&self, queue: u32, worker: usize) -> usize {
        let own = (0..self.sockets).find(|number| self.reader(queue, *number) == worker);
        own.unwrap_or(worker % self.sockets)
    }
}

/// Tries `mode` on an interface of the calling thread's network namespace. Blocks while a queue is in use.
///
/// # Errors
/// Why not; nothing is left behind.
pub fn attempt(kernel: &Kernel, facts: &Facts, workers: usize, mode: Mode) -> Result<Opened, Refusal> {
    let xdp = match mode {
        Mode::ZeroCopy | Mode::Native => XdpMode::Driver,
        Mode::Generic => XdpMode::Skb,
    };
    let link =
        kernel.lock().plane.attach_uplink(&facts.name, xdp).map_err(|e| no_program(&facts.name, &e))?;
    match open_all(kernel, facts, workers, mode) {
        Ok(places) => Ok(Opened { link, places }),
        Err(refusal) => {
            // It goes with the device then.
            let _gone = kernel.lock().plane.detach_uplink(link);
            Err(refusal)
        }
    }
}

fn open_all(
    kernel: &Kernel,
    facts: &Facts,
    workers: usize,
    mode: Mode,
) -> Result<Vec<Vec<FastPlace<Socket>>>, Refusal> {
    let transfer = if mode == Mode::ZeroCopy { Transfer::ZeroCopy } else { Transfer::Copy };
    let plan = Plan::new(facts.queues, workers, facts.mtu);
    let plan = plan.ok_or_else(|| Refusal::Interface("its packets fit no frame".to_owned()))?;
    let mut places: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    for queue in 0..plan.queues {
        let place = Place { interface: facts.index, queue, transfer };
        let (_, ports) = open(place, plan.sockets, plan.sizes)?;
        if ports.iter().any(|port| port.wire().is_zero_copy() != (transfer == Transfer::ZeroCopy)) {
            return Err(OpenError::NoZeroCopy.into());
        }
        let mut kernel = kernel.lock();
        if let Some(uplink) = &mut kernel.uplink {
            for worker in (0..workers).filter_map(WorkerId::new) {
                let port = &ports[plan.socket_for(queue, worker.get())];
                let socket = Some(std::os::fd::AsFd::as_fd(port.wire()));
                uplink.set_socket(queue, worker, socket).map_err(|e| Refusal::Interface(format!("{e:#}")))?;
            }
        }
        for (number, port) in ports.into_iter().enumerate() {
            places[plan.reader(queue, number)].push(FastPlace { interface: facts.index, port });
        }
    }
    Ok(places)
}

/// What the kernel means by refusing the program.
fn no_program(name: &str, error: &anyhow::Error) -> Refusal {
    let code = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    match code {
        Some(libc::EBUSY) => Refusal::Interface(format!(
            "another XDP program is attached to {name}; `ip link set dev {name} xdp off` removes it"
        )),
        Some(libc::EPERM) => {
            Refusal::Interface(format!("attaching an XDP program to {name} needs CAP_NET_ADMIN"))
        }
        Some(libc::EOPNOTSUPP) => Refusal::Mode(format!("the driver of {name} takes no XDP program so")),
        _ => Refusal::Mode(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use gateway_common::maps::MAX_WORKERS;

    use super::*;

    #[test]
    fn every_worker_has_a_ring_for_it_on_every_queue_and_one_of_its_own_if_there_are_enough() {
        for (queues, workers) in [(1, 1), (1, 2), (4, 8), (2, 12), (64, 64), (1, 64), (200, 3)] {
            let plan = Plan::new(queues, workers, 1500).unwrap();
            assert!(plan.queues <= 64 && plan.sockets <= MAX_SOCKETS && workers <= MAX_WORKERS);
            let mut own = vec![0; workers];
            for queue in 0..plan.queues {
                let readers: Vec<_> = (0..plan.sockets).map(|number| plan.reader(queue, number)).collect();
                let different: std::collections::BTreeSet<_> = readers.iter().collect();
                assert_eq!(different.len(), readers.len(), "{plan:?}: one worker twice on a queue");
                for (worker, own) in own.iter_mut().enumerate() {
                    let number = plan.socket_for(queue, worker);
                    assert!(number < plan.sockets);
                    if readers.contains(&worker) {
                        assert_eq!(readers[number], worker, "{plan:?}");
                        *own += 1;
                    }
                }
            }
            if plan.queues as usize * plan.sockets >= workers {
                assert!(own.iter().all(|rings| *rings > 0), "{plan:?}: {own:?}");
            }
            let bytes = plan.queues as usize * plan.sizes.frames as usize * plan.sizes.frame;
            assert!(bytes <= MAX_MEMORY || plan.sockets == 1, "{plan:?}");
        }
        assert_eq!(Plan::new(1, 1, 9000), None);
    }

    #[test]
    fn what_the_kernel_says_is_one_clear_sentence() {
        let of = |code| anyhow::Error::from(io::Error::from_raw_os_error(code)).context("cannot attach");
        assert!(matches!(no_program("eth0", &of(libc::EBUSY)),
            Refusal::Interface(text) if text.starts_with("another XDP program is attached to eth0; ")));
        assert!(matches!(no_program("eth0", &of(libc::EPERM)),
            Refusal::Interface(text) if text == "attaching an XDP program to eth0 needs CAP_NET_ADMIN"));
        assert!(matches!(no_program("eth0", &of(libc::EOPNOTSUPP)),
            Refusal::Mode(text) if text == "the driver of eth0 takes no XDP program so"));
        assert!(
            matches!(no_program("eth0", &of(libc::ERANGE)), Refusal::Mode(text) if text.contains("cannot attach: "))
        );
    }
}

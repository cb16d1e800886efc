//! An XDP program of forty instructions for tests: UDP to port [`PORT`] + n goes to slot queue * [`WORKERS`] + n of a
//! map of sockets, everything else to the kernel; so does what belongs into an empty slot.
//!
//! It is written in the kernel's instructions, so that these tests need no object, and is loaded by the plain system
//! call.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use gateway_common::frame::{ETHERNET, IPV4, IPV6, PROTOCOL_UDP, TYPE_IPV4, TYPE_IPV6, UDP};

/// The first port.
pub const PORT: u16 = 52_625;
/// Ports, and slots of each queue.
pub const WORKERS: u32 = 4;
const SLOTS: u32 = 64;

/// How a program is attached.
#[derive(Debug, Clone, Copy)]
pub enum Mode {
    Native = 1 << 2,
    Generic = 1 << 1,
}

/// The program, attached until this is dropped.
pub struct Redirect {
    map: OwnedFd,
    _link: OwnedFd,
}

impl Redirect {
    pub fn attach(interface: u32, mode: Mode) -> io::Result<Self> {
        let map = bpf(MAP_CREATE, &[word(XSKMAP), word(4), word(4), word(SLOTS)].concat())?;
        let program = program(map.as_raw_fd());
        let license = c"Apache-2.0";
        let mut log = vec![0_u8; 16 << 10];
        let load = [
            &word(XDP)[..],
            &word(program.len() as u32),
            &(program.as_ptr().addr() as u64).to_ne_bytes(),
            &(license.as_ptr().addr() as u64).to_ne_bytes(),
            &word(1),
            &word(log.len() as u32),
            &(log.as_mut_ptr().addr() as u64).to_ne_bytes(),
        ];
        let program = bpf(PROG_LOAD, &load.concat()).map_err(|e| {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(0);
            io::Error::other(format!("{e}: {}", String::from_utf8_lossy(&log[..end])))
        })?;
        let link = [word(program.as_raw_fd() as u32), word(interface), word(ATTACH_XDP), word(mode as u32)];
        let link = bpf(LINK_CREATE, &link.concat())?;
        Ok(Self { map, _link: link })
    }

    /// What belongs to `worker` and arrives on `queue` goes to `socket`.
    pub fn set(&self, queue: u32, worker: u32, socket: &impl AsFd) {
        let (key, value) = (queue * WORKERS + worker, socket.as_fd().as_raw_fd());
        let (key, value) = (&raw const key, &raw const value);
        let update = [
            u64::from(self.map.as_raw_fd() as u32).to_ne_bytes(),
            (key.addr() as u64).to_ne_bytes(),
            (value.addr() as u64).to_ne_bytes(),
            [0; 8],
        ];
        call(MAP_UPDATE, &update.concat()).unwrap();
    }

    /// What belongs to `worker` and arrives on `queue` goes to the kernel.
    pub fn clear(&self, queue: u32, worker: u32) {
        let key = queue * WORKERS + worker;
        let key = (&raw const key).addr() as u64;
        let delete = [u64::from(self.map.as_raw_fd() as u32).to_ne_bytes(), key.to_ne_bytes()];
        call(MAP_DELETE, &delete.concat()).unwrap();
    }
}

const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const MAP_DELETE: u32 = 3;
const PROG_LOAD: u32 = 5;
const LINK_CREATE: u32 = 28;
const XSKMAP: u32 = 17;
const XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_PASS: i32 = 2;

fn word(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

/// A call that makes a descriptor.
fn bpf(command: u32, attributes: &[u8]) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    #[expect(unsafe_code, reason = "the kernel hands out a number")]
    // SAFETY: these commands return a new descriptor, which nobody else knows.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd)
}

fn call(command: u32, attributes: &[u8]) -> io::Result<i32> {
    let mut union = [0_u64; 18];
    let size = size_of_val(&union);
    bytemuck::cast_slice_mut::<u64, u8>(&mut union)[..attributes.len()].copy_from_slice(attributes);
    #[expect(unsafe_code, reason = "a system call that takes an address")]
    // SAFETY: the kernel reads `size` bytes, and what the addresses in them lead to, all of which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, union.as_mut_ptr(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// The program over the map `map`.
fn program(map: i32) -> Vec<u64> {
    // Where the protocol is in an IP header, and the destination port in a UDP header.
    let (protocol_v4, protocol_v6, port) = (ETHERNET as i16 + 9, ETHERNET as i16 + 6, 2);
    let (udp_v4, udp_v6) = ((ETHERNET + IPV4) as i16, (ETHERNET + IPV6) as i16);
    // Registers 0 to 9, r1 is the context; jumps are by names.
    let mut code = Code::default();
    code.add(0x61, 2, 1, 0, 0); // r2 = data
    code.add(0x61, 3, 1, 4, 0); // r3 = data_end
    code.add(0xbf, 4, 2, 0, 0); // r4 = r2
    code.add(0x07, 4, 0, 0, (ETHERNET + IPV4 + UDP) as i32);
    code.jump(0x2d, 4, 3, 0, "pass"); // shorter
    code.add(0x69, 5, 2, ETHERNET as i16 - 2, 0); // r5 = type
    code.jump(0x15, 5, 0, i32::from(u16::to_be(TYPE_IPV4)), "v4");
    code.jump(0x15, 5, 0, i32::from(u16::to_be(TYPE_IPV6)), "v6");
    code.jump(0x05, 0, 0, 0, "pass");
    code.label("v4");
    code.add(0x71, 5, 2, protocol_v4, 0); // r5 = protocol
    code.jump(0x55, 5, 0, PROTOCOL_UDP.into(), "pass");
    code.add(0x69, 5, 2, udp_v4 + port, 0); // r5 = destination port
    code.jump(0x05, 0, 0, 0, "port");
    code.label("v6");
    code.add(0x07, 4, 0, 0, (IPV6 - IPV4) as i32);
    code.jump(0x2d, 4, 3, 0, "pass");
    code.add(0x71, 5, 2, protocol_v6, 0);
    code.jump(0x55, 5, 0, PROTOCOL_UDP.into(), "pass");
    code.add(0x69, 5, 2, udp_v6 + port, 0);
    code.label("port");
    code.add(0xdc, 5, 0, 0, 16); // from network order
    code.jump(0xa5, 5, 0, i32::from(PORT), "pass"); // lower
    code.jump(0x25, 5, 0, i32::from(PORT) + WORKERS as i32 - 1, "pass"); // higher
    code.add(0x17, 5, 0, 0, i32::from(PORT));
    code.add(0x61, 2, 1, 16, 0); // r2 = queue
    code.add(0x27, 2, 0, 0, WORKERS as i32);
    code.add(0x0f, 2, 5, 0, 0);
    code.add(0x18, 1, 1, 0, map); // r1 = map, two places
    code.add(0, 0, 0, 0, 0);
    code.add(0xb7, 3, 0, 0, XDP_PASS); // for an empty slot
    code.add(0x85, 0, 0, 0, 51); // bpf_redirect_map
    code.add(0x95, 0, 0, 0, 0);
    code.label("pass");
    code.add(0xb7, 0, 0, 0, XDP_PASS);
    code.add(0x95, 0, 0, 0, 0);
    code.link()
}

#[derive(Default)]
struct Code {
    instructions: Vec<(u8, u8, i16, i32)>,
    jumps: Vec<(usize, &'static str)>,
    labels: Vec<(usize, &'static str)>,
}

impl Code {
    fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.instructions.push((code, from << 4 | to, offset, value));
    }

    fn jump(&mut self, code: u8, to: u8, from: u8, value: i32, label: &'static str) {
        self.jumps.push((self.instructions.len(), label));
        self.add(code, to, from, 0, value);
    }

    fn label(&mut self, name: &'static str) {
        self.labels.push((self.instructions.len(), name));
    }

    fn link(mut self) -> Vec<u64> {
        for (at, name) in self.jumps {
            let (target, _) = self.labels.iter().find(|(_, label)| *label == name).expect("a label");
            self.instructions[at].2 = (target - at - 1) as i16;
        }
        let encode = |(code, registers, offset, value): (u8, u8, i16, i32)| {
            let ([o0, o1], [v0, v1, v2, v3]) = (offset.to_ne_bytes(), value.to_ne_bytes());
            u64::from_ne_bytes([code, registers, o0, o1, v0, v1, v2, v3])
        };
        self.instructions.into_iter().map(encode).collect()
    }
}

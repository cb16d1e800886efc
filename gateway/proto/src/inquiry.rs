//! What an operator asks the workers, and what they answer. Types only: who answers is `worker/answers.rs`, who asks and
//! joins the answers is the shell.
//!
//! A question goes as [`Command::Inquire`](crate::Command::Inquire) to every worker, so only one is under way at a time,
//! and comes back as one [`Reply`](crate::WorkerEvent::Replied) of each. Every question is bounded in what it looks at:
//! packets wait meanwhile.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use gateway_common::DropReason;

use crate::{
    flow::FlowProtocol,
    ids::{ClientId, ResourceId, WorkerId},
    names::DomainName,
    worker::{Volume, inner::Transport},
};

/// Clients that [`Question::Clients`] looks at: whoever wants to know of more asks again.
pub const PAGE: u32 = 256;
/// Flows that one question looks at.
pub const MAX_FLOWS_SEEN: usize = 16_384;
/// Flows that one worker tells of.
pub const MAX_FLOWS_TOLD: usize = 500;

/// One question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inquiry {
    /// Comes back with the answers; a later question has a higher one.
    pub serial: u64,
    /// What is asked.
    pub question: Question,
}

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// How the clients are that a worker holds: those at places `from` to `from +` [`PAGE`] of its table.
    Clients {
        /// The first place.
        from: u32,
    },
    /// Which flows are open, newest first: of one client, or of all.
    Flows {
        /// Whose.
        client: Option<ClientId>,
        /// At most so many, and at most [`MAX_FLOWS_TOLD`].
        most: usize,
    },
    /// What would become of such a packet.
    Why(Imagined),
}

/// A packet that an operator wonders about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imagined {
    /// Its source.
    pub src: IpAddr,
    /// Its destination.
    pub dst: IpAddr,
    /// What it carries; of ports only the resource's counts.
    pub transport: Transport,
}

/// One worker's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Whose.
    pub worker: WorkerId,
    /// To which question.
    pub serial: u64,
    /// What it says.
    pub answer: Answer,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Clients`].
    Clients {
        /// Those of the page that this worker holds.
        clients: Vec<ClientFigures>,
        /// How many places its table has.
        places: u32,
    },
    /// To [`Question::Flows`].
    Flows {
        /// Whether flows are counted at all.
        counted: bool,
        /// How many are open.
        open: usize,
        /// The newest, the newest first.
        flows: Vec<OpenFlow>,
        /// There were more than [`MAX_FLOWS_SEEN`]: newer ones may be missing.
        looked_at_all: bool,
    },
    /// To [`Question::Why`]; `None` if the packet is no business of a client of this worker.
    Why(Option<Verdict>),
}

/// What only its worker knows of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFigures {
    /// Whose.
    pub id: ClientId,
    /// How long ago the session was made that packets to it are encrypted with; `None` without one.
    pub handshake_age: Option<Duration>,
    /// Client to resource, carried since this gateway knows it.
    pub outbound: Volume,
    /// Resource to client.
    pub inbound: Volume,
    /// Translated sessions to DNS resources.
    pub translated: usize,
    /// Open flows; `None` while they are not counted.
    pub flows: Option<usize>,
    /// What flows carried by resource since they are counted, ascending: to it, from it. Empty if they are not counted, or
    /// are more than one question looks at.
    pub by_resource: Vec<(ResourceId, Volume, Volume)>,
}

/// A flow that is open. Volumes are those of the payload of TCP or UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenFlow {
    /// Whose.
    pub client: ClientId,
    /// To which resource.
    pub resource: ResourceId,
    /// TCP or UDP.
    pub protocol: FlowProtocol,
    /// The client's side.
    pub src: SocketAddr,
    /// The resource's side, behind the translation.
    pub dst: SocketAddr,
    /// The name that the client reached it by.
    pub domain: Option<DomainName>,
    /// How long ago it began.
    pub age: Duration,
    /// How long ago its last packet passed.
    pub quiet: Duration,
    /// Client to resource.
    pub outbound: Volume,
    /// Resource to client.
    pub inbound: Volume,
}

/// What would become of an imagined packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whose packet it is.
    pub client: ClientId,
    /// It comes from the client, or goes to it.
    pub is_outbound: bool,
    /// The client has a session, so that such a packet could arrive or leave now.
    pub has_session: bool,
    /// The name behind the proxy address that it goes to.
    pub domain: Option<DomainName>,
    /// Let through, or why not.
    pub outcome: Result<Let, DropReason>,
}

/// How a packet is let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Let {
    /// By this resource; `None` for what is for the gateway itself, or from it.
    pub by: Option<ResourceId>,
    /// Where it goes instead of to a proxy address.
    pub real: Option<IpAddr>,
}

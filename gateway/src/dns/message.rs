//! What the servers know about a DNS message: is it a query that we forward, is an answer the one to our question, and
//! how an answer is made to fit. Bytes in, bytes out; nothing here knows a socket.
//!
//! Queries and answers pass byte for byte except for their ID: options and records that nobody here has heard of are
//! none of our business.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode},
    rr::RecordType,
};

/// What goes into one UDP answer at most, in bytes, whatever the client offers: the tunnel carries packets of 1280 bytes,
/// and 40 + 8 of them are headers. It is also what we offer.
pub const UDP_LIMIT: usize = 1232;
/// What every resolver takes, in bytes (RFC 1035 section 4.2.1); a smaller offer means this (RFC 6891 section 6.2.3).
pub const UDP_MINIMUM: usize = 512;
/// Length of a DNS header, in bytes.
const HEADER: usize = 12;

/// A query that can be forwarded.
#[derive(Debug, Clone)]
pub struct Query {
    bytes: Vec<u8>,
    message: Message,
}

/// Why there is nothing to forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejected {
    /// Not ours to answer: a response, or too short to have an ID and flags.
    Silent,
    /// To be answered with these bytes.
    Answer {
        /// The RCODE in them.
        code: ResponseCode,
        /// The whole message.
        bytes: Vec<u8>,
    },
}

impl Query {
    /// Reads what a client sent.
    ///
    /// # Errors
    /// With what to answer instead: FORMERR where an ID is readable, NOTIMP for opcodes other than QUERY, REFUSED for
    /// zone transfers, which no forwarder can give in one message.
    pub fn read(bytes: &[u8]) -> Result<Self, Rejected> {
        let [id_high, id_low, flags, ..] = bytes else { return Err(Rejected::Silent) };
        // QR: two servers that answer each other's answers would never stop.
        if flags & 0x80 != 0 {
            return Err(Rejected::Silent);
        }
        let mut bare =
            Message::response(u16::from_be_bytes([*id_high, *id_low]), OpCode::from_u8((flags >> 3) & 0xf));
        bare.metadata.recursion_desired = flags & 1 != 0;
        if bare.metadata.op_code != OpCode::Query {
            return Err(reject(bare, ResponseCode::NotImp));
        }
        if bytes.len() < HEADER {
            return Err(reject(bare, ResponseCode::FormErr));
        }
        match Message::from_vec(bytes) {
            Ok(message) if message.queries.len() == 1 => {
                let query = Self { bytes: bytes.to_vec(), message };
                match query.question().query_type() {
                    RecordType::AXFR | RecordType::IXFR => {
                        Err(reject(query.reply(ResponseCode::Refused), ResponseCode::Refused))
                    }
                    _ => Ok(query),
                }
            }
            _ => Err(reject(bare, ResponseCode::FormErr)),
        }
    }

    /// The message for a nameserver: the client's, with an ID that only we know.
    pub fn with_id(&self, id: u16) -> Vec<u8> {
        with_id(&self.bytes, id)
    }

    /// How long a UDP answer to this client may be, in bytes (RFC 6891 section 6.2.3).
    pub fn udp_limit(&self) -> usize {
        let offered = self.message.edns.as_ref().map_or(0, Edns::max_payload);
        usize::from(offered).clamp(UDP_MINIMUM, UDP_LIMIT)
    }

    /// Makes a nameserver's answer to [`Query::with_id`] the answer to the client.
    ///
    /// # Errors
    /// [`Foreign`] if it does not answer this question with this ID, or is no well-formed answer at all.
    pub fn accept(&self, answer: &[u8], id: u16) -> Result<Answer, Foreign> {
        // Before the costly part: most strays fail here.
        if answer.len() < HEADER || answer[..2] != id.to_be_bytes() || answer[2] & 0x80 == 0 {
            return Err(Foreign);
        }
        let mut message = Message::from_vec(answer).map_err(|_| Foreign)?;
        let is_ours = message.metadata.message_type == MessageType::Response
            && message.metadata.op_code == OpCode::Query
            && match message.queries.as_slice() {
                [question] => is_same(question, self.question()),
                // Some servers that cannot read a question do not repeat it (RFC 1035 section 4.1.1).
                [] => message.metadata.response_code == ResponseCode::FormErr,
                _ => false,
            };
        if !is_ours {
            return Err(Foreign);
        }
        message.metadata.id = self.message.metadata.id;
        Ok(Answer { bytes: with_id(answer, message.metadata.id), message })
    }

    /// An answer without records: ID, opcode, RD and the question are the query's, RA is set because forwarding is what
    /// we are for, and a query with OPT gets one back (RFC 6891 section 6.1.1).
    pub fn error(&self, code: ResponseCode) -> Vec<u8> {
        encode(&self.reply(code))
    }

    /// What it asks for.
    pub fn kind(&self) -> RecordType {
        self.question().query_type()
    }

    fn reply(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.message.metadata.id, OpCode::Query);
        reply.metadata.recursion_desired = self.message.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = code;
        reply.add_query(self.question().clone());
        if let Some(theirs) = &self.message.edns {
            reply.set_edns(own_edns(theirs));
        }
        reply
    }

    fn question(&self) -> &Question {
        // `read` lets nothing else through.
        &self.message.queries[0]
    }
}

/// Bytes that are no answer to what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign;

/// A nameserver's answer, with the client's ID.
#[derive(Debug, Clone)]
pub struct Answer {
    bytes: Vec<u8>,
    message: Message,
}

impl Answer {
    /// The nameserver cut it.
    pub fn is_truncated(&self) -> bool {
        self.message.metadata.truncation
    }

    /// RCODE, without the bits that are in OPT.
    pub fn code(&self) -> ResponseCode {
        self.message.metadata.response_code
    }

    /// The whole message, for TCP.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The message for UDP: at most `limit` bytes, else only header with TC, question and OPT, which tells the client to
    /// come again over TCP (RFC 2181 section 9, RFC 6891 section 7).
    pub fn into_udp(self, limit: usize) -> Vec<u8> {
        if self.bytes.len() <= limit {
            return self.bytes;
        }
        let mut cut = self.message.truncate();
        cut.metadata.recursion_available = true;
        if let Some(theirs) = &self.message.edns {
            let mut edns = own_edns(theirs);
            edns.set_rcode_high(theirs.rcode_high());
            cut.set_edns(edns);
        }
        encode(&cut)
    }
}

/// A question is the same in any case of letters: some servers answer in lower case.
fn is_same(a: &Question, b: &Question) -> bool {
    a.name() == b.name() && a.query_type() == b.query_type() && a.query_class() == b.query_class()
}

/// Version 0, our size, and DO as it was (RFC 3225 section 3). Options are for the hop they were sent over.
fn own_edns(theirs: &Edns) -> Edns {
    let mut edns = Edns::new();
    #[expect(clippy::cast_possible_truncation, reason = "1232")]
    edns.set_max_payload(UDP_LIMIT as u16);
    edns.set_dnssec_ok(theirs.flags().dnssec_ok);
    edns
}

fn reject(mut message: Message, code: ResponseCode) -> Rejected {
    message.metadata.response_code = code;
    message.metadata.recursion_available = true;
    Rejected::Answer { code, bytes: encode(&message) }
}

/// A message without records, which cannot be too long and holds only names that were read before.
fn encode(message: &Message) -> Vec<u8> {
    message.to_vec().unwrap_or_else(|_| {
        let metadata = &message.metadata;
        let [high, low] = metadata.id.to_be_bytes();
        let flags = 0x80 | (u8::from(metadata.op_code) << 3) | u8::from(metadata.recursion_desired);
        vec![high, low, flags, 0x80 | metadata.response_code.low(), 0, 0, 0, 0, 0, 0, 0, 0]
    })
}

fn with_id(bytes: &[u8], id: u16) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some(place) = bytes.first_chunk_mut::<2>() {
        *place = id.to_be_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests;

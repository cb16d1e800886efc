//! Tables of queries and answers, and a hundred thousand that nobody would write.

use hickory_proto::rr::{Name, RData, Record, rdata::TXT};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::*;

/// `_x.a.b` TXT, ID 0x1234, RD: the example of dns.md section 4.4.
const QUERY: [u8; 24] =
    *b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02_x\x01a\x01b\x00\x00\x10\x00\x01";

#[test]
fn what_is_no_query_has_its_answer() {
    let mut two_questions = QUERY.to_vec();
    two_questions[5] = 2;
    two_questions.extend_from_within(12..);
    let mut no_question = QUERY[..12].to_vec();
    no_question[5] = 0;
    let mut two_opts = QUERY.to_vec();
    two_opts[11] = 2;
    two_opts.extend(b"\0\0\x29\x04\xd0\0\0\0\0\0\0\0\0\x29\x04\xd0\0\0\0\0\0\0");
    let mut loop_of_pointers = QUERY[..12].to_vec();
    loop_of_pointers.extend(b"\xc0\x0c\0\x10\0\x01");
    let table: &[(&str, &[u8], Option<ResponseCode>)] = &[
        ("nothing", b"", None),
        ("half an ID", b"\x12", None),
        ("an ID and nothing else", b"\x12\x34", None),
        ("a response", &edit(2, 0x81), None),
        ("a response to something unknown", b"\x12\x34\xf8", None),
        ("half a header", &QUERY[..7], Some(ResponseCode::FormErr)),
        ("half a question", &QUERY[..20], Some(ResponseCode::FormErr)),
        ("no question", &no_question, Some(ResponseCode::FormErr)),
        ("two questions", &two_questions, Some(ResponseCode::FormErr)),
        ("a record that is not there", &edit(11, 1), Some(ResponseCode::FormErr)),
        ("two OPT records", &two_opts, Some(ResponseCode::FormErr)),
        ("a name that points at itself", &loop_of_pointers, Some(ResponseCode::FormErr)),
        ("STATUS", &edit(2, 0x11), Some(ResponseCode::NotImp)),
        ("NOTIFY", &edit(2, 0x21), Some(ResponseCode::NotImp)),
        ("UPDATE", &edit(2, 0x29), Some(ResponseCode::NotImp)),
        ("an unknown opcode, half a header", &[0x12, 0x34, 0x79], Some(ResponseCode::NotImp)),
        ("a zone transfer", &edit(21, 252), Some(ResponseCode::Refused)),
        ("an incremental one", &edit(21, 251), Some(ResponseCode::Refused)),
    ];
    for (name, bytes, expect) in table {
        match (Query::read(bytes), expect) {
            (Err(Rejected::Silent), None) => {}
            (Err(Rejected::Answer { code, bytes: answer }), Some(expect)) => {
                assert_eq!(code, *expect, "{name}");
                let answer = Message::from_vec(&answer).unwrap();
                assert_eq!(answer.metadata.response_code, *expect, "{name}");
                assert_eq!(answer.metadata.id, 0x1234, "{name}");
                assert_eq!(answer.metadata.message_type, MessageType::Response, "{name}");
                assert_eq!(u8::from(answer.metadata.op_code), (bytes[2] >> 3) & 0xf, "{name}");
                assert!(answer.metadata.recursion_available && !answer.metadata.truncation, "{name}");
            }
            (other, expect) => panic!("{name}: {other:?} instead of {expect:?}"),
        }
    }
}

#[test]
fn a_servfail_is_the_documented_bytes_with_ra() {
    let expect = b"\x12\x34\x81\x82\x00\x01\x00\x00\x00\x00\x00\x00\x02_x\x01a\x01b\x00\x00\x10\x00\x01";
    assert_eq!(Query::read(&QUERY).unwrap().error(ResponseCode::ServFail), expect);
    // And with OPT there is OPT: version 0, 1232 bytes, DO as asked, no option of the client's.
    let answer = Message::from_vec(&with_opt(4096).error(ResponseCode::Refused)).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    let edns = answer.edns.unwrap();
    assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, 1232, true));
    assert!(edns.options().as_ref().is_empty());
}

#[test]
fn forwarding_changes_the_id_and_nothing_else() {
    let query = with_opt(1400);
    let forwarded = query.with_id(0xabcd);
    assert_eq!(forwarded[..2], [0xab, 0xcd]);
    assert_eq!(forwarded[2..], query.bytes[2..]);
}

#[test]
fn the_clients_size_counts_between_512_and_1232() {
    assert_eq!(Query::read(&QUERY).unwrap().udp_limit(), 512);
    for (offered, expect) in
        [(0, 512), (511, 512), (512, 512), (1000, 1000), (1232, 1232), (1233, 1232), (u16::MAX, 1232)]
    {
        assert_eq!(with_opt(offered).udp_limit(), expect, "{offered}");
    }
}

#[test]
fn only_the_answer_to_the_question_is_accepted() {
    let query = Query::read(&QUERY).unwrap();
    let right = answer_to(&query, 7, 1);
    assert_eq!(query.accept(&right, 7).unwrap().into_bytes()[..2], [0x12, 0x34], "the client's ID is back");
    let mut lower = right.clone();
    lower[13..15].make_ascii_uppercase();
    assert!(query.accept(&lower, 7).is_ok(), "other letters");

    let change = |index: usize, byte: u8| {
        let mut other = right.clone();
        other[index] = byte;
        other
    };
    let mut formerr = right[..12].to_vec();
    formerr[3..12].copy_from_slice(&[0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(query.accept(&formerr, 7).unwrap().code(), ResponseCode::FormErr, "without a question");
    let mut nameless = formerr.clone();
    nameless[3] = 0x82;
    for (name, bytes) in [
        ("another ID", change(1, 8)),
        ("a query", change(2, 0x01)),
        ("another opcode", change(2, 0xa1)),
        ("another name", change(16, b'c')),
        ("another type", change(21, 1)),
        ("another class", change(23, 3)),
        ("cut in the middle", right[..right.len() - 1].to_vec()),
        ("cut in the header", right[..11].to_vec()),
        ("empty", Vec::new()),
        ("no question, SERVFAIL", nameless),
        ("the query itself", query.with_id(7)),
    ] {
        assert_eq!(query.accept(&bytes, 7).unwrap_err(), Foreign, "{name}");
    }
}

#[test]
fn an_answer_that_is_too_long_keeps_question_and_opt() {
    for (query, records) in [(Query::read(&QUERY).unwrap(), 9), (with_opt(1232), 20)] {
        let answer = query.accept(&answer_to(&query, 7, records), 7).unwrap();
        let whole = answer.clone().into_bytes();
        assert_eq!(answer.clone().into_udp(whole.len()), whole, "what fits is not touched");
        let limit = query.udp_limit();
        let cut = answer.into_udp(limit);
        assert!(cut.len() <= limit, "{}", cut.len());
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        assert_eq!(cut.metadata.id, 0x1234);
        assert_eq!(cut.queries, query.message.queries);
        assert_eq!(cut.edns.is_some(), query.message.edns.is_some());
    }
}

#[test]
fn no_bytes_are_too_strange() {
    let mut random = SmallRng::seed_from_u64(53);
    let query = with_opt(1232);
    let seeds = [QUERY.to_vec(), query.bytes.clone(), answer_to(&query, 7, 3)];
    let (mut queries, mut answers, mut rejected) = (0, 0, 0);
    for round in 0..100_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random.random()),
            }
        }
        match Query::read(&bytes) {
            Ok(read) => {
                queries += 1;
                assert!(Message::from_vec(&read.error(ResponseCode::ServFail)).is_ok(), "{bytes:02x?}");
                assert_eq!(read.with_id(1).len(), bytes.len());
                assert!((512..=1232).contains(&read.udp_limit()));
            }
            Err(Rejected::Answer { bytes: answer, .. }) => {
                rejected += 1;
                assert_eq!(answer[..2], bytes[..2]);
                assert!(answer[2] & 0x80 != 0 && answer.len() <= 512, "{bytes:02x?}");
            }
            Err(Rejected::Silent) => {}
        }
        if let Ok(answer) = query.accept(&bytes, 7) {
            answers += 1;
            assert!(answer.into_udp(40).len() <= 512, "{bytes:02x?}");
        }
    }
    // All three ways were walked, often.
    assert!(queries > 10_000 && answers > 10_000 && rejected > 10_000, "{queries} {answers} {rejected}");
}

fn edit(index: usize, byte: u8) -> Vec<u8> {
    let mut bytes = QUERY.to_vec();
    bytes[index] = byte;
    bytes
}

/// With OPT: `size` bytes, DO, one option that means nothing to us.
fn with_opt(size: u16) -> Query {
    let mut bytes = edit(11, 1);
    bytes.extend(b"\0\0\x29");
    bytes.extend(size.to_be_bytes());
    bytes.extend(b"\0\0\x80\0\0\x06\xff\xf0\0\x02hi");
    Query::read(&bytes).unwrap()
}

/// A nameserver's answer with `records` TXT records of 100 bytes.
fn answer_to(query: &Query, id: u16, records: usize) -> Vec<u8> {
    let mut answer = Message::response(id, OpCode::Query);
    answer.metadata.recursion_desired = true;
    answer.metadata.recursion_available = true;
    answer.add_query(query.question().clone());
    let name = Name::from_ascii("_x.a.b.").unwrap();
    for _ in 0..records {
        answer.add_answer(Record::from_rdata(name.clone(), 60, RData::TXT(TXT::new(vec!["x".repeat(100)]))));
    }
    if query.message.edns.is_some() {
        answer.set_edns(Edns::new());
    }
    answer.to_vec().unwrap()
}

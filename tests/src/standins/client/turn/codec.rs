//! Bytes of TURN requests and of ChannelData.

use stun_types::attribute::{Nonce, Realm, Software, Username};
use stun_types::message::{
    BINDING, IntegrityAlgorithm, IntegrityKey, LongTermCredentials, Message, MessageClass,
    MessageIntegrityCredentials, MessageType, MessageWrite as _, MessageWriteExt as _, MessageWriteVec,
    Method, TransactionId,
};
use turn_types::AddressFamily;
use turn_types::attribute::{
    AdditionalAddressFamily, ChannelNumber, Lifetime, RequestedTransport, XorPeerAddress,
};
use turn_types::message::{ALLOCATE, CHANNEL_BIND, REFRESH};

use super::{Credentials, FIRST_CHANNEL, REALM, What};

impl Credentials {
    /// The request's bytes, attributes in the order of sections 8.3, 8.5 and 8.7.
    pub(super) fn encode(&self, what: What, id: TransactionId) -> Vec<u8> {
        let method: Method = match what {
            What::Binding => BINDING,
            What::Allocate => ALLOCATE,
            What::Refresh { .. } => REFRESH,
            What::Bind { .. } => CHANNEL_BIND,
        };
        let kind = MessageType::from_class_method(MessageClass::Request, method);
        let mut message = Message::builder(kind, id, MessageWriteVec::new());
        let mut add = |attribute: &dyn stun_types::prelude::AttributeWrite| {
            message.add_attribute(attribute).expect("a request of a few hundred bytes has room for it");
        };
        if let What::Bind { number, peer } = what {
            add(&XorPeerAddress::new(peer, id));
            add(&ChannelNumber::new(number));
        }
        // Upstream sends both in REFRESH too; RFC 8656 knows them in ALLOCATE only, and coturn (which is known by
        // wanting unsigned requests first) answers 420.
        let like_allocate = matches!(what, What::Refresh { .. }) && !self.unsigned;
        if what == What::Allocate || like_allocate {
            add(&RequestedTransport::new(RequestedTransport::UDP));
            add(&AdditionalAddressFamily::new(AddressFamily::IPV6));
        }
        add(&Software::new(&self.software).expect("our own name is short"));
        if what == What::Binding {
            return message.finish();
        }
        if what == (What::Refresh { keep: false }) {
            add(&Lifetime::new(0));
        }
        if self.unsigned && self.nonce.is_none() {
            return message.finish();
        }
        if let Ok(username) = Username::new(&self.username) {
            add(&username);
        }
        add(&Realm::new(REALM).expect("the realm is short"));
        if let Some(Ok(nonce)) = self.nonce.as_deref().map(Nonce::new) {
            add(&nonce);
        }
        message
            .add_message_integrity_with_key(&self.key, IntegrityAlgorithm::Sha1)
            .expect("nothing follows the integrity");
        message.finish()
    }
}

/// `MD5(username ":" realm ":" password)` (RFC 8489 section 9.2.2).
pub(super) fn long_term_key(username: &str, password: &str) -> IntegrityKey {
    let credentials = LongTermCredentials::new(username.to_owned(), password.to_owned());
    MessageIntegrityCredentials::from(credentials.to_key(REALM.to_owned())).make_key(IntegrityAlgorithm::Sha1)
}

/// Number and payload when the length field equals the remaining bytes exactly (relay-dialect.md section 4).
pub(super) fn split_channel_data(datagram: &[u8]) -> Option<(u16, &[u8])> {
    let (header, payload) = datagram.split_first_chunk::<4>()?;
    let number = u16::from_be_bytes([header[0], header[1]]);
    let length = u16::from_be_bytes([header[2], header[3]]);
    (usize::from(length) == payload.len() && number >= FIRST_CHANNEL).then_some((number, payload))
}

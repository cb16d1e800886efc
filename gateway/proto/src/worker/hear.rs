//! What clients tell the gateway inside the tunnel (packets.md section 6), once `control_packet.rs` has said what it is. Knows
//! clients and what control must hear; no layout, no answer: those are control's, and leave in `moving.rs`.

use std::time::Instant;

use gateway_common::DropReason;

use super::{Worker, control_packet::Control, peers::Entry, slot::Slot};
use crate::{WorkerEvent, names::AssignedIps};

impl Worker {
    /// A control packet of the client at `slot`. What it says of names waits for its budget; a goodbye does not.
    pub(super) fn handle_control(
        &mut self,
        slot: Slot,
        control: Control,
        packet: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        match control {
            Control::AssignedIps { json_at } => self.handle_assigned(slot, &packet[json_at..], now)?,
            Control::Goodbye => self.handle_goodbye(slot, now),
            Control::Unknown(_) => {}
        }
        self.traffic.control += 1;
        Ok(())
    }

    #[cold]
    fn handle_assigned(&mut self, slot: Slot, json: &[u8], now: Instant) -> Result<(), DropReason> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        let Some(index) = peer.link.as_deref().map(|link| link.index) else { return Ok(()) };
        // Before it is read: reading is what costs.
        if !peer.take_control(now) {
            return Err(DropReason::ControlBudget);
        }
        let assigned = AssignedIps::parse(json).map(Box::new).ok_or(DropReason::MalformedControl)?;
        let event = WorkerEvent::Assigned { id: peer.id, index, assigned };
        if self.events.push(event) { Ok(()) } else { Err(DropReason::ControlQueueFull) }
    }

    fn handle_goodbye(&mut self, slot: Slot, now: Instant) {
        // "p2p goodbye from client: peer (all authorisations!) and connection removed immediately"
        let Some(peer) = self.peers.remove(slot).and_then(Entry::into_peer) else { return };
        if let Some(link) = &peer.link {
            self.events.push(WorkerEvent::Goodbye { id: peer.id, index: link.index });
        }
        self.retire(peer, now);
    }
}

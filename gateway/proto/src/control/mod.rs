//! Everything that is rare: relays, ICE, authorizations, timers. It hears STUN and TURN only.

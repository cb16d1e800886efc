//! What control writes to the log: no secret at any level, and no WARN while all is well.

use std::sync::{Arc, Mutex};

use super::*;

#[test]
fn no_secret_reaches_the_log_at_any_level() {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone()).finish();
    // The client of the simulation is no part of the gateway: it is made without a log, and the ICE library writes
    // no credentials after that.
    let [first, second] = [(); 2].map(|()| World::bare(epoch(), 2, None, None));
    let (text, world) = tracing::subscriber::with_default(subscriber, || {
        // A log statement that another test's thread meets first, just now, may be cached as disabled: the first
        // turn is for that.
        life_of_a_client(first);
        tracing::callsite::rebuild_interest_cache();
        let world = life_of_a_client(second);
        (log.text(), world)
    });
    assert!(text.contains("Access allowed") && text.contains("TRACE"), "the log was looked at: {text}");
    assert!(!text.contains(" WARN "), "normal operation logs no WARN: {text}");
    let turn = world.init(None).relays.into_iter().map(|r| r.password.0.to_string());
    let ice = ["v4gth7yrtmrzjum2tyhguq".to_owned(), "5dm2b4nl6bk6m77jluz5md".to_owned()];
    for secret in turn.chain(ice) {
        assert!(!text.contains(&secret), "{secret}");
    }
}

/// From `init` to the last rejected resource, with a relay lost in between.
fn life_of_a_client(mut world: World) -> World {
    world.portal_returns();
    let init = world.init(Some(vec![]));
    world.ingress(Ingress::Init(Box::new(init)));
    world.run(SECOND);
    world.authorize(1);
    world.authorize(1);
    world.run(5 * SECOND);
    let removed = world.twins[0].0;
    world.ingress(Ingress::RelaysPresence { disconnected: vec![removed], connected: vec![] });
    world.run(5 * SECOND);
    let client = world.client.id;
    world.ingress(Ingress::RejectAccess(client, ResourceId(Uuid::from_u128(1))));
    world
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

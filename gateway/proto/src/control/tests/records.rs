//! What workers are told so that flows can be recorded: whether, whose, and what time it is.

use serde_json::json;

use super::{super::Config, *};
use crate::{
    command::Command,
    control::{Control, Workers},
    flow::UnixTime,
    portal::{
        ingest_token::tests::{claims, token_of},
        messages::{FlowLogs, Init, Secret},
    },
};

fn authorize(world: &mut World, resource: u128, token: Option<Secret>) {
    let mut authorize = world.client.authorize(resource, None);
    authorize.flow_logs_ingest_token = token;
    world.ingress(Ingress::Authorize(Box::new(authorize)));
}

/// A token whose claims name policy `policy`.
fn token(policy: &str, uploads: bool) -> Option<Secret> {
    let mut claims = claims();
    claims["policy_id"] = json!(policy);
    claims["uploads_enabled"] = json!(uploads);
    Some(token_of(&claims))
}

/// Resource and policy of what the workers know.
fn attributed(world: &World) -> Vec<(u128, String)> {
    let attributions = &world.state().expect("a client").attributions;
    attributions.iter().map(|(id, a)| (id.0.as_u128(), a.claims.policy_id.clone())).collect()
}

/// Policies whose tokens the shell was given.
fn for_upload(world: &World) -> Vec<String> {
    let policy = |event: &Event| match event {
        Event::IngestToken(attribution) => Some(attribution.claims.policy_id.clone()),
        _ => None,
    };
    world.events.iter().filter_map(policy).collect()
}

#[test]
fn workers_know_whom_a_flow_is_attributed_to_while_it_is_authorized() {
    let mut world = settled();
    authorize(&mut world, 2, token("b", true));
    authorize(&mut world, 1, token("a", false));
    authorize(&mut world, 3, None);
    let pairs = |list: &[(u128, &str)]| list.iter().map(|(n, p)| (*n, (*p).to_owned())).collect::<Vec<_>>();
    assert_eq!(attributed(&world), pairs(&[(1, "a"), (2, "b")]));
    assert_eq!(for_upload(&world), ["b"], "the other must not be uploaded");
    let before = world.state().unwrap().resources.clone();
    authorize(&mut world, 2, token("b2", true));
    assert_eq!(attributed(&world), pairs(&[(1, "a"), (2, "b2")]));
    assert!(
        std::sync::Arc::ptr_eq(&before, &world.state().unwrap().resources),
        "no policy is compiled for it"
    );
    assert_eq!(for_upload(&world), ["b", "b2"]);
    world.ingress(Ingress::RejectAccess(world.client.id, ResourceId(Uuid::from_u128(2))));
    assert_eq!(attributed(&world), pairs(&[(1, "a")]));
    authorize(&mut world, 1, None);
    assert_eq!(attributed(&world), []);
    assert_eq!(resources(&world), [1, 3]);
}

#[test]
fn a_token_that_cannot_be_used_does_not_cost_access() {
    let mut world = settled();
    let mut hostile = claims();
    hostile["role"] = json!("../initiator");
    authorize(&mut world, 1, Some(token_of(&hostile)));
    assert_eq!((resources(&world), attributed(&world)), (vec![1], vec![]));
    assert_eq!(for_upload(&world), [""; 0]);
}

#[test]
fn flows_are_accounted_while_portal_or_operator_want_it() {
    let settings = |interval| FlowLogs {
        api_url: "https://api.example".into(),
        upload_interval_secs: interval,
        upload_batch_size: 0,
    };
    for always in [false, true] {
        let (now, unix_now) = (epoch(), Duration::from_secs(UNIX_START));
        let config = Config { seed: 1, unix_now, now, workers: Workers::ONE, flow_logs: always };
        let mut control = Control::new(config);
        let told = |control: &mut Control| {
            std::iter::from_fn(|| control.poll_command())
                .filter_map(|c| if let Command::Accounting { on } = c { Some(on) } else { None })
                .collect::<Vec<_>>()
        };
        let expect = |changes: &[bool]| if always { vec![] } else { changes.to_vec() };
        assert_eq!(told(&mut control), if always { vec![true] } else { vec![] });
        for (flow_logs, changes) in [
            (Some(settings(0)), &[][..]),
            (Some(settings(60)), &[true]),
            (Some(settings(30)), &[]),
            (None, &[false]),
            (Some(settings(1)), &[true]),
            (Some(settings(0)), &[false]),
        ] {
            let init = World::new(now, 1).init(None);
            control.handle_ingress(Ingress::Init(Box::new(Init { flow_logs, ..init })), now);
            assert_eq!(told(&mut control), expect(changes));
        }
    }
}

#[test]
fn workers_are_told_the_time_at_the_start_and_when_the_clock_was_set() {
    let (now, unix_now) = (epoch(), Duration::from_secs(UNIX_START));
    let config = Config { seed: 1, unix_now, now, workers: Workers::ONE, flow_logs: false };
    let mut control = Control::new(config);
    let told = |control: &mut Control| {
        std::iter::from_fn(|| control.poll_command())
            .filter_map(|c| if let Command::WallClock(clock) = c { Some(clock.unix_time(now)) } else { None })
            .collect::<Vec<_>>()
    };
    assert_eq!(told(&mut control), [UnixTime(unix_now)]);
    control.handle_wall_clock(unix_now + SECOND, now + SECOND);
    assert_eq!(told(&mut control), [], "the clocks agree");
    control.handle_wall_clock(unix_now + 61 * SECOND, now + SECOND);
    assert_eq!(told(&mut control), [UnixTime(unix_now + 60 * SECOND)]);
}

//! What becomes of channels and their numbers, step by step, without requests: those are in `channel_rules`.

use super::*;
use crate::relay::twin::start;

fn peer(n: usize) -> SocketAddr {
    let port = u16::try_from(n % 60_000).unwrap() + 1;
    let host = u8::try_from(n / 60_000).unwrap();
    SocketAddr::from(([10, 0, 0, host], port))
}

fn bound(channels: &mut Channels, n: usize, why: Use, now: Instant) -> u16 {
    let Wanted::Bind(number) = channels.want(peer(n), why, now) else { panic!("no number for {n}") };
    assert_eq!(channels.on_bind_sent(number, now), Some(peer(n)));
    assert_eq!(channels.on_bound(number, now), Some((peer(n), false)));
    number
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn a_lost_refresh_leaves_its_channel_bound_and_a_lost_first_bind_is_asked_for_again() {
    let (mut channels, t) = (Channels::default(), crate::relay::twin::start());
    let Wanted::Bind(number) = channels.want(peer(1), Use::Checked, t) else { panic!("a bind") };
    assert_eq!(channels.on_bind_sent(number, t), Some(peer(1)));
    assert_eq!(channels.on_unanswered(number, t + secs(8)), Some(peer(1)), "it was open");
    assert_eq!(channels.sendable(peer(1), t + secs(8)), None);
    assert_eq!(channels.want(peer(1), Use::Checked, t + secs(8)), Wanted::Bind(number));
    channels.on_bind_sent(number, t + secs(8));
    channels.on_bound(number, t + secs(9));
    assert_eq!(channels.on_used(number, true, t + secs(10)), Wanted::Nothing);
    assert_eq!(channels.pop_due(t + secs(9) + REFRESH), Some(Due::Refresh(number)));
    assert_eq!(channels.on_unanswered(number, t + secs(17) + REFRESH), None);
    assert_eq!(channels.sendable(peer(1), t + secs(17) + REFRESH), Some(number), "it lives on");
    let again = channels.on_used(number, true, t + secs(18) + REFRESH);
    assert_eq!(again, Wanted::Bind(number), "and is refreshed when it is used");
}

#[test]
fn data_may_be_sent_while_the_first_bind_is_in_flight_and_for_600_s_after() {
    let t = start();
    let mut channels = Channels::default();
    assert_eq!(channels.want(peer(1), Use::Checked, t), Wanted::Bind(0x4000));
    assert_eq!(channels.want(peer(1), Use::Checked, t), Wanted::Nothing);
    assert_eq!(channels.sendable(peer(1), t), None, "the bind waits for its turn");
    assert_eq!(channels.on_bind_sent(0x4000, t), Some(peer(1)));
    assert_eq!(channels.sendable(peer(1), t), Some(0x4000));
    assert_eq!(channels.on_bound(0x4000, t), Some((peer(1), false)));
    assert_eq!(channels.sendable(peer(1), t + secs(599)), Some(0x4000));
    assert_eq!(channels.sendable(peer(1), t + secs(600)), None);
    assert_eq!(channels.pop_due(t + secs(600)), Some(Due::Gone(0x4000, peer(1))));
    assert_eq!(channels.want(peer(1), Use::Checked, t + secs(700)), Wanted::Bind(0x4000));
    assert_eq!(channels.sendable(peer(1), t + secs(700)), None, "a lapsed number waits for the success");
    assert_eq!(channels.on_bound(0x4000, t + secs(701)), Some((peer(1), true)));
    assert_eq!(channels.sendable(peer(1), t + secs(701)), Some(0x4000));
}

#[test]
fn a_bind_that_is_withdrawn_leaves_what_was_before_it() {
    let t = start();
    let mut channels = Channels::default();
    assert_eq!(channels.want(peer(1), Use::Checked, t), Wanted::Bind(0x4000));
    channels.withdraw(0x4000);
    assert_eq!(channels.pop_due(t), Some(Due::Free), "nobody ever asked the server for it");
    let number = bound(&mut channels, 2, Use::Nominated, t);
    assert_eq!(channels.pop_due(t + secs(240)), Some(Due::Refresh(number)));
    channels.withdraw(number);
    assert_eq!(channels.sendable(peer(2), t + secs(241)), Some(number));
    assert_eq!(channels.on_used(number, true, t + secs(241)), Wanted::Bind(number), "it can be wanted again");
    channels.withdraw(number);
    assert_eq!(channels.pop_due(t + secs(600)), Some(Due::Gone(number, peer(2))));
    assert_eq!(channels.want(peer(2), Use::Checked, t + secs(600)), Wanted::Bind(number));
    channels.withdraw(number);
    assert_eq!(channels.pop_due(t + secs(240) + REUSE), None);
    assert_eq!(channels.pop_due(t + secs(241) + REUSE), Some(Due::Free), "counted from its last data");
}

#[test]
fn only_channels_in_use_are_refreshed_at_240_s() {
    let t = start();
    let table = [
        ("nothing happened", Use::Checked, None, false, None),
        ("data came", Use::Signalled, Some(true), false, Some(240)),
        ("data went", Use::Checked, Some(false), false, Some(240)),
        ("nominated", Use::Nominated, None, false, Some(240)),
        ("nominated, then released", Use::Nominated, Some(true), true, None),
    ];
    for (name, why, used, released, expect) in table {
        let mut channels = Channels::default();
        let number = bound(&mut channels, 1, why, t);
        if let Some(received) = used {
            assert_eq!(channels.on_used(number, received, t + secs(5)), Wanted::Nothing, "{name}");
        }
        if released {
            channels.release(peer(1));
        }
        assert_eq!(channels.poll_timeout(), Some(t + secs(240)), "{name}");
        assert_eq!(channels.pop_due(t + secs(240)), expect.map(|_| Due::Refresh(number)), "{name}");
        assert_eq!(channels.pop_due(t + secs(240)), None, "{name}");
        assert_eq!(channels.poll_timeout(), Some(t + secs(600)), "{name}");
    }
}

#[test]
fn data_on_a_quiet_channel_refreshes_it_at_once() {
    let t = start();
    let mut channels = Channels::default();
    let number = bound(&mut channels, 1, Use::Checked, t);
    assert_eq!(channels.pop_due(t + secs(240)), None);
    assert_eq!(channels.on_used(number, false, t + secs(400)), Wanted::Bind(number));
    assert_eq!(channels.on_used(number, false, t + secs(401)), Wanted::Nothing, "one refresh at a time");
    assert_eq!(channels.on_bound(number, t + secs(402)), None, "it was bound all the time");
}

#[test]
fn a_number_serves_another_peer_when_it_is_free_for_sure_after_its_last_bind_and_data() {
    let t = start();
    let mut channels = Channels::default();
    let first = bound(&mut channels, 1, Use::Checked, t);
    assert_eq!(channels.pop_due(t + secs(600)), Some(Due::Gone(first, peer(1))));
    assert_eq!(channels.on_used(first, true, t + secs(700)), Wanted::Nothing);
    assert_eq!(channels.pop_due(t + REUSE), None);
    assert_eq!(channels.poll_timeout(), Some(t + secs(700) + REUSE));
    assert_eq!(channels.pop_due(t + secs(700) + REUSE), Some(Due::Free));
    channels.next = FIRST;
    assert_eq!(channels.want(peer(2), Use::Checked, t + secs(700) + REUSE), Wanted::Bind(first));
}

#[test]
fn when_numbers_run_low_the_signalled_go_without_and_at_the_end_one_is_given_up() {
    let t = start();
    let mut channels = Channels::default();
    let mut n = 0;
    while channels.want(peer(n), Use::Signalled, t) != Wanted::Exhausted {
        let number = FIRST + u16::try_from(n).unwrap();
        channels.on_bound(number, t);
        channels.on_used(number, true, t);
        n += 1;
    }
    assert_eq!(n, COUNT - RESERVE + 1);
    while channels.want(peer(n), Use::Checked, t) != Wanted::Exhausted {
        n += 1;
    }
    assert_eq!(n, COUNT);
    assert_eq!(channels.want(peer(n), Use::Nominated, t), Wanted::Exhausted);
    let refreshed = |channels: &mut Channels| {
        std::iter::from_fn(|| channels.pop_due(t + secs(240)))
            .filter(|d| matches!(d, Due::Refresh(_)))
            .count()
    };
    channels.give_up_a_signalled_one();
    assert_eq!(refreshed(&mut channels), COUNT - RESERVE, "one less than were bound");
}

#[test]
fn a_refused_peer_is_left_alone_for_30_s_and_keeps_its_number_until_nobody_can_hold_it() {
    let t = start();
    let mut channels = Channels::default();
    assert_eq!(channels.want(peer(1), Use::Checked, t), Wanted::Bind(0x4000));
    channels.on_bind_sent(0x4000, t);
    assert_eq!(channels.on_refused(0x4000, t), Some(peer(1)));
    assert_eq!(channels.on_refused(0x4000, t), None, "once");
    assert_eq!(channels.sendable(peer(1), t), None);
    assert_eq!(channels.want(peer(1), Use::Checked, t + secs(29)), Wanted::Nothing);
    // A copy of the refused bind may have been accepted, so it is the same number that is asked for.
    for again in (30..1500).step_by(30) {
        let now = t + secs(again);
        assert_eq!(channels.want(peer(1), Use::Checked, now), Wanted::Bind(0x4000), "at {again}");
        assert_eq!(channels.want(peer(1), Use::Checked, now), Wanted::Nothing, "one bind at a time");
        assert_eq!(channels.pop_due(now + REUSE), None, "it is not free while its bind is in flight");
        channels.on_bind_sent(0x4000, now);
        assert_eq!(channels.on_refused(0x4000, now), Some(peer(1)));
    }
    let last = t + secs(1470);
    channels.on_used(0x4000, true, last + secs(5));
    assert_eq!(channels.poll_timeout(), Some(last + secs(5) + REUSE), "somebody does hold it");
    assert_eq!(channels.pop_due(last + secs(5) + REUSE), Some(Due::Free));
    assert_eq!(channels.want(peer(1), Use::Checked, last + secs(5) + REUSE), Wanted::Bind(0x4001));
}

#[test]
fn a_refused_refresh_gets_its_number_back() {
    let t = start();
    let mut channels = Channels::default();
    let number = bound(&mut channels, 1, Use::Nominated, t);
    assert_eq!(channels.pop_due(t + secs(240)), Some(Due::Refresh(number)));
    channels.on_bind_sent(number, t + secs(240));
    assert_eq!(channels.on_refused(number, t + secs(241)), Some(peer(1)));
    assert_eq!(channels.want(peer(1), Use::Nominated, t + secs(271)), Wanted::Bind(number));
    assert_eq!(channels.sendable(peer(1), t + secs(271)), None, "it waits for the success");
    channels.on_bind_sent(number, t + secs(271));
    assert_eq!(channels.on_bound(number, t + secs(272)), Some((peer(1), false)));
    assert_eq!(channels.sendable(peer(1), t + secs(272)), Some(number));
}

#[test]
fn clearing_names_the_open_ones_and_numbers_go_on() {
    let t = start();
    let mut channels = Channels::default();
    bound(&mut channels, 1, Use::Checked, t);
    for (n, number) in [(2, 0x4001), (3, 0x4002)] {
        assert_eq!(channels.want(peer(n), Use::Checked, t), Wanted::Bind(number));
        channels.on_bind_sent(number, t);
    }
    channels.on_refused(0x4002, t);
    assert_eq!(channels.want(peer(4), Use::Checked, t), Wanted::Bind(0x4003), "which is not sent");
    assert_eq!(channels.clear(t + IN_FLIGHT), [(0x4000, peer(1)), (0x4001, peer(2))]);
    assert_eq!(channels.poll_timeout(), None);
    assert_eq!(channels.want(peer(2), Use::Checked, t + IN_FLIGHT), Wanted::Bind(0x4004));
}

#[test]
fn a_peer_whose_bind_may_reach_the_next_allocation_keeps_its_number() {
    let t = start();
    let just_before = t + IN_FLIGHT - Duration::from_millis(1);
    let mut channels = Channels::default();
    bound(&mut channels, 1, Use::Nominated, t);
    for n in 2..=4 {
        assert!(matches!(channels.want(peer(n), Use::Checked, t), Wanted::Bind(_)), "{n}");
        if n < 4 {
            channels.on_bind_sent(FIRST + u16::try_from(n).unwrap() - 1, t);
        }
    }
    channels.on_refused(0x4002, t);
    assert_eq!(channels.clear(just_before), [(0x4000, peer(1)), (0x4001, peer(2))]);
    assert_eq!(channels.clear(just_before), [], "once");
    for (n, number) in [(1, 0x4000), (2, 0x4001), (3, 0x4002), (4, 0x4004)] {
        assert_eq!(channels.sendable(peer(n), just_before), None, "{n}");
        assert_eq!(channels.want(peer(n), Use::Checked, just_before), Wanted::Bind(number), "{n}");
    }
    // Whom nobody wants again.
    channels.withdraw(0x4001);
    assert_eq!(channels.poll_timeout(), Some(t + REUSE));
}

#[test]
fn a_channel_that_lapses_while_its_refresh_is_in_flight_opens_again_by_a_repetition_or_the_success() {
    let t = start();
    for repeated in [true, false] {
        let mut channels = Channels::default();
        let number = bound(&mut channels, 1, Use::Nominated, t);
        assert_eq!(channels.pop_due(t + secs(599)), Some(Due::Refresh(number)));
        assert_eq!(channels.on_bind_sent(number, t + secs(599)), None, "it is open already");
        assert_eq!(channels.pop_due(t + secs(600)), Some(Due::Gone(number, peer(1))));
        if repeated {
            assert_eq!(channels.on_bind_sent(number, t + secs(600)), Some(peer(1)));
        }
        assert_eq!(channels.on_bound(number, t + secs(601)), Some((peer(1), !repeated)));
    }
}

//! The wall clock: what it shows, and the moment somebody sets it (or the machine wakes up).
//!
//! The core counts in monotonic time and is told what the wall clock shows. Every tick does that; a step between two
//! ticks is noticed by a timer that the kernel cancels when the clock is set (`timerfd_create(2)`,
//! `TFD_TIMER_CANCEL_ON_SET`).

use std::{
    os::fd::OwnedFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::io::unix::AsyncFd;

/// When the timer would fire: in the year 2512.
const NEVER: Timespec = Timespec { tv_sec: 1 << 34, tv_nsec: 0 };

/// The time since 1970-01-01 UTC; zero if the clock shows less.
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Wakes up when the wall clock is set.
#[derive(Debug)]
pub struct Steps {
    timer: AsyncFd<OwnedFd>,
}

impl Steps {
    /// Starts to watch.
    ///
    /// # Errors
    /// The kernel gives no timer, or there is no tokio runtime.
    pub fn watch() -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).context("Cannot make a timer")?;
        let never = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: NEVER };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &never).context("Cannot watch the wall clock")?;
        #[expect(
            deprecated,
            reason = "an OwnedFd stays open and the same while it lives, which is all that the unsafe successor asks for"
        )]
        let timer = AsyncFd::new(timer).context("Cannot wait for the wall clock")?;
        Ok(Self { timer })
    }

    /// Returns after the clock was set since the last call. Cancel-safe.
    pub async fn next(&mut self) {
        loop {
            let Ok(mut ready) = self.timer.readable().await else { return std::future::pending().await };
            let mut expirations = [0; 8];
            match ready.try_io(|timer| rustix::io::read(timer, &mut expirations).map_err(Into::into)) {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => return,
                // It fired, in 2512 or because the clock was set beyond that: the next tick tells the time.
                Ok(_) => return std::future::pending().await,
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::time::{ClockId, clock_gettime, clock_settime};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_clock_that_is_set_wakes_and_one_that_runs_does_not() {
        let mut steps = Steps::watch().unwrap();
        assert!(timeout(Duration::from_millis(100), steps.next()).await.is_err());
        for _ in 0..2 {
            // To what it shows: a step of some nanoseconds, but a step.
            if let Err(error) = clock_settime(ClockId::Realtime, clock_gettime(ClockId::Realtime)) {
                println!("skipped: the clock cannot be set here: {error}");
                return;
            }
            timeout(Duration::from_secs(5), steps.next()).await.expect("woken by the step");
            assert!(timeout(Duration::from_millis(100), steps.next()).await.is_err(), "once per step");
        }
    }
}

//! A vector's latch, tried in the orders in which threads can come. `make interleavings` runs this with shuttle.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use shuttle::thread;

use super::latch::Latch;

/// A route that counts its signals.
type Counter = AtomicU32;

fn count(route: &Counter) -> Result<(), Infallible> {
    route.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// As `Vectors::signal` does.
fn signal(latch: &Latch<Counter>) {
    let Ok(()) = match latch.route() {
        Some(route) => count(route),
        None => latch.latch(count),
    };
}

fn take(latch: &Latch<Counter>) {
    let Ok(_route) = latch.take(|| Ok(Counter::new(0)), count);
}

/// Does all this at once, in every order, to a latch of its own. Then its route has `expected` signals.
fn in_every_order(acts: &'static [fn(&Latch<Counter>)], expected: std::ops::RangeInclusive<u32>) {
    let scenario = move || {
        let latch = Arc::new(Latch::default());
        let threads: Vec<_> = acts
            .iter()
            .map(|act| {
                let latch = Arc::clone(&latch);
                thread::spawn(move || act(&latch))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(!latch.is_latched(), "a signal was left behind");
        let came = latch.route().unwrap().load(Ordering::Relaxed);
        assert!(expected.contains(&came), "{came} signals came");
    };
    shuttle::check_dfs(scenario, None);
}

#[test]
fn a_signal_reaches_the_route_that_is_taken_meanwhile() {
    in_every_order(&[signal, take], 1..=1);
}

#[test]
fn two_signals_before_a_route_is_taken_are_one_or_two() {
    fn twice(latch: &Latch<Counter>) {
        signal(latch);
        signal(latch);
    }
    in_every_order(&[twice, take], 1..=2);
}

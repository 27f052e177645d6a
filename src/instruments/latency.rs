//! The latency from a signal to its delivery, while another thread works or rests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The delivery of one signal.
#[derive(Clone, Copy, Debug)]
pub struct Delivery {
    pub took: Duration,
    /// Whether the signal was pending after its write, because its route was not armed.
    pub late: bool,
}

/// The deliveries of one measurement.
#[derive(Debug)]
pub struct Latencies {
    pub nanoseconds: Vec<u64>,
    /// The number of late ones.
    pub late: u64,
    /// How often the other thread did its work.
    pub worked: u64,
}

/// Calls `signal` without pause, with a running number, for a time. Meanwhile another thread calls `work` in the same
/// way, if there is any.
pub fn latencies<E: Send>(
    time: Duration,
    mut signal: impl FnMut(usize) -> Result<Delivery, E>,
    work: Option<impl FnMut(u64) -> Result<(), E> + Send>,
) -> Result<Latencies, E> {
    let (stop, worked) = (AtomicBool::new(false), AtomicU64::new(0));
    let labour = |mut work: Box<dyn FnMut(u64) -> Result<(), E> + Send + '_>| {
        while !stop.load(Ordering::Relaxed) {
            work(worked.load(Ordering::Relaxed))?;
            worked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let worker = work.map(|work| scope.spawn(|| labour(Box::new(work))));
        // The work's first time may be a longer one.
        while worker.as_ref().is_some_and(|worker| worked.load(Ordering::Relaxed) < 2 && !worker.is_finished()) {
            std::thread::yield_now();
        }
        let before = worked.load(Ordering::Relaxed);
        let mut found = Latencies { nanoseconds: Vec::new(), late: 0, worked: 0 };
        let begun = Instant::now();
        // Each side has its turn at least once, however busy the machine is.
        let idle = || {
            worker.as_ref().is_some_and(|worker| worked.load(Ordering::Relaxed) == before && !worker.is_finished())
        };
        let goes_on = |number: &usize| *number == 0 || begun.elapsed() < time || idle();
        let signals = (0..).take_while(goes_on).try_for_each(|number| {
            let delivery = signal(number)?;
            found.nanoseconds.push(delivery.took.as_nanos() as u64);
            found.late += u64::from(delivery.late);
            Ok(())
        });
        found.worked = worked.load(Ordering::Relaxed) - before;
        stop.store(true, Ordering::Relaxed);
        let labour =
            worker.map_or(Ok(()), |worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        signals.and(labour).map(|()| found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Delivery = Delivery { took: Duration::from_nanos(7), late: false };

    #[test]
    fn signals_and_work_go_on_side_by_side_until_the_time_is_over() {
        let late = |number| Ok(Delivery { late: number == 0, ..NOW });
        let found = latencies(Duration::from_millis(20), late, Some(|_| Ok::<_, ()>(()))).unwrap();
        assert!(!found.nanoseconds.is_empty() && found.nanoseconds.iter().all(|took| *took == 7));
        assert_eq!(found.late, 1);
        assert!(found.worked > 0);
    }

    #[test]
    fn a_failure_of_either_ends_the_measurement() {
        let time = Duration::from_millis(20);
        let idle = None::<fn(u64) -> Result<(), i32>>;
        assert_eq!(latencies(time, |_| Err(1), idle).unwrap_err(), 1);
        assert_eq!(latencies(time, |_| Ok(NOW), Some(|_| Err(2))).unwrap_err(), 2);
    }
}

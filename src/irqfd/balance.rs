//! Whether loading pays for few routes: the pushes that it saves them, less those that it costs.
//!
//! Pushing a small table is cheaper than moving an armed irqfd. A guest that masks an interrupt while it changes the
//! message has it disarmed and armed anyway. There the push is an extra, which a loaded message saves. What guests will
//! do is not known beforehand, so the retargets so far decide (as in the ski rental problem): the table is loaded when
//! not having done so has cost as many pushes as loading costs.

/// How a commit gives routes other messages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retargets {
    /// Whether one of the routes was armed.
    pub(super) armed: bool,
    /// Whether one of them was disarmed, and had a message before.
    pub(super) disarmed: bool,
    /// Whether a message is missing in the kernel's table.
    pub(super) missed: bool,
}

/// The balance of a partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Balance {
    /// How many small pushes take as long as the largest one.
    load: usize,
    /// The pushes that loading saves, up to twice `load`, so that a table which has served for long survives a miss.
    saved: usize,
    loads: bool,
}

impl Balance {
    /// That of a partition without routes. A push of `small` entries or less counts as small.
    pub(super) fn new(spares: usize, small: usize) -> Self {
        Self { load: spares.checked_div(small).unwrap_or(0).max(1), saved: 0, loads: false }
    }

    /// Whether the table of few routes is loaded.
    pub(super) fn loads(&self) -> bool {
        self.loads
    }

    /// Counts a commit of a partition with few routes.
    pub(super) fn note(&mut self, retargets: Retargets) {
        let Retargets { armed, disarmed, missed } = retargets;
        self.saved = if self.loads && missed {
            self.saved.saturating_sub(self.load)
        } else if armed {
            self.saved.saturating_sub(1)
        } else {
            (self.saved + usize::from(disarmed)).min(2 * self.load)
        };
        self.loads = self.saved > if self.loads { 0 } else { self.load - 1 };
    }

    /// With many routes loading always pays. What is loaded then serves on when routes are closed.
    pub(super) fn fill(&mut self) {
        (self.saved, self.loads) = (self.load, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARMED: Retargets = Retargets { armed: true, disarmed: false, missed: true };
    const MASKED: Retargets = Retargets { armed: false, disarmed: true, missed: true };
    const HIT: Retargets = Retargets { missed: false, ..MASKED };
    const MOVED: Retargets = Retargets { missed: false, ..ARMED };
    const NEW: Retargets = Retargets { armed: false, disarmed: false, missed: true };

    /// Four small pushes take as long as a load.
    fn balance() -> Balance {
        Balance::new(256, 64)
    }

    /// How many of these commits turn it.
    fn until_it_turns(balance: &mut Balance, retargets: Retargets) -> usize {
        let before = balance.loads();
        1 + (0..100)
            .take_while(|_| {
                balance.note(retargets);
                balance.loads() == before
            })
            .count()
    }

    #[test]
    fn masked_retargets_that_cost_as_much_as_a_load_turn_it_and_as_many_armed_ones_turn_it_back() {
        let mut balance = balance();
        assert_eq!(until_it_turns(&mut balance, MASKED), 4);
        assert_eq!(until_it_turns(&mut balance, MOVED), 4);
        (0..100).for_each(|_| balance.note(ARMED));
        assert_eq!(until_it_turns(&mut balance, MASKED), 4);
        (0..100).for_each(|_| balance.note(HIT));
        assert_eq!(until_it_turns(&mut balance, MOVED), 8);
    }

    #[test]
    fn armed_retargets_take_masked_ones_back_and_new_messages_count_for_nothing() {
        let mut balance = balance();
        for _ in 0..100 {
            [MASKED, NEW, ARMED, NEW].into_iter().for_each(|retargets| balance.note(retargets));
            assert!(!balance.loads());
        }
        let both = Retargets { armed: true, ..MASKED };
        (0..100).for_each(|_| balance.note(both));
        assert!(!balance.loads());
    }

    #[test]
    fn a_miss_costs_a_load_so_that_a_guest_that_always_misses_is_not_loaded_for() {
        let mut balance = balance();
        for _ in 0..10 {
            assert_eq!(until_it_turns(&mut balance, MASKED), 4);
            assert_eq!(until_it_turns(&mut balance, MASKED), 1);
        }
        until_it_turns(&mut balance, MASKED);
        (0..4).for_each(|_| balance.note(HIT));
        balance.note(MASKED);
        assert!(balance.loads(), "it has served for long");
        balance.note(NEW);
        assert!(!balance.loads());
    }

    #[test]
    fn what_many_routes_have_loaded_serves_on_until_a_miss() {
        let mut balance = balance();
        balance.fill();
        balance.note(HIT);
        assert_eq!(until_it_turns(&mut balance, MOVED), 5);
        balance.fill();
        assert_eq!(until_it_turns(&mut balance, NEW), 1);
    }

    #[test]
    fn without_spare_gsis_or_small_pushes_a_load_costs_one() {
        for (spares, small) in [(0, 64), (3, 64), (2000, 0)] {
            assert_eq!(until_it_turns(&mut Balance::new(spares, small), MASKED), 1);
        }
    }
}

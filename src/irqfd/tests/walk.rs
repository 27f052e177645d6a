//! Any steps on a partition whose kernel refuses any calls, against what the rules say of each outcome.
//!
//! `PROPTEST_CASES` sets the number of walks.

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Edit {
    Set(u8),
    Clear,
    Mask,
    Unmask,
}

/// What is done to routes, which are numbered modulo how many there are.
#[derive(Clone, Debug)]
enum Deed {
    New,
    Close(usize),
    Change(usize, Edit),
    Commit(Vec<(usize, Edit)>),
}

#[derive(Clone, Debug)]
struct Step {
    deed: Deed,
    /// Which of the calls that it makes fail, counted from its first.
    failing: BTreeSet<usize>,
    drain_fails: bool,
}

fn edits() -> impl Strategy<Value = Edit> {
    prop_oneof![
        3 => (0x20..0x24u8).prop_map(Edit::Set),
        1 => Just(Edit::Clear),
        1 => Just(Edit::Mask),
        2 => Just(Edit::Unmask),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let deed = prop_oneof![
        2 => Just(Deed::New),
        1 => (0..8usize).prop_map(Deed::Close),
        5 => (0..8usize, edits()).prop_map(|(at, edit)| Deed::Change(at, edit)),
        4 => vec((0..8usize, edits()), 0..8).prop_map(Deed::Commit),
    ];
    let failing = prop_oneof![2 => Just(BTreeSet::new()), 1 => btree_set(0..9usize, 1..5)];
    (deed, failing, prop::bool::weighted(0.03)).prop_map(|(deed, failing, drain_fails)| Step {
        deed,
        failing,
        drain_fails,
    })
}

/// A route and what was asked of it with success.
struct Asked {
    route: IrqFdRoute,
    masked: bool,
    msi: Option<MsiRoute>,
}

impl Asked {
    fn edit(&mut self, edit: Edit) {
        match edit {
            Edit::Set(vector) => self.msi = Some(msi(vector)),
            Edit::Clear => self.msi = None,
            Edit::Mask => self.masked = true,
            Edit::Unmask => self.masked = false,
        }
    }

    fn should_be_armed(&self) -> bool {
        !self.masked && self.msi.is_some()
    }
}

struct Walk {
    partition: Arc<Partition>,
    recorder: Recorder,
    routes: Vec<Asked>,
    broken: BTreeSet<u32>,
    /// Routes that should be armed and could not be armed again.
    lapsed: BTreeSet<u32>,
}

impl Walk {
    fn new(quiesce: bool) -> Self {
        let (partition, recorder) = partition(quiesce);
        Self { partition, recorder, routes: Vec::new(), broken: BTreeSet::new(), lapsed: BTreeSet::new() }
    }

    fn states(&self) -> BTreeMap<u32, GsiState> {
        self.routes.iter().map(|asked| (asked.route.gsi(), asked.route.state().unwrap())).collect()
    }

    fn step(&mut self, step: &Step) {
        let before = self.states();
        self.recorder.taken();
        self.recorder.fail(step.failing.iter().copied());
        self.recorder.kernel().drain_fails = step.drain_fails;
        let (result, touched) = match &step.deed {
            Deed::New => (self.open(), Vec::new()),
            Deed::Close(at) => (self.close(*at), Vec::new()),
            Deed::Change(at, edit) => self.commit(&[(*at, *edit)], false),
            Deed::Commit(edits) => self.commit(edits, true),
        };
        let made = self.recorder.taken();
        let struck = step.failing.len() - self.recorder.kernel().failing.len();
        self.recorder.kernel().drain_fails = false;
        assert!(made.iter().filter(|call| matches!(call, Push(_))).count() <= if result.is_ok() { 1 } else { 2 });
        match result {
            Err(Error::Failed(failure)) => {
                assert!(struck > 0 || step.drain_fails, "it failed although no call did: {failure}");
                assert!(
                    failure.broken.iter().all(|gsi| touched.contains(gsi)),
                    "nothing was asked of {:?}, which it broke",
                    failure.broken
                );
                if struck == 1 && !step.drain_fails && !matches!(step.deed, Deed::Close(_)) {
                    // But for what an earlier failure left disarmed: that may have come right on the way.
                    let mut after = self.states();
                    after.extend(self.lapsed.iter().map(|gsi| (*gsi, before[gsi])));
                    assert_eq!(after, before, "a single failure leaves all as it was");
                }
                self.broken.extend(&failure.broken);
                self.lapsed.extend(&failure.disarmed);
            }
            Err(Error::Broken(gsi)) => assert!(self.broken.contains(&gsi)),
            Err(Error::Exhausted(_)) => {
                assert_eq!(
                    self.routes.iter().filter(|asked| !self.is_broken(asked)).count() + self.broken.len(),
                    8
                );
            }
            Err(error) => panic!("{error}"),
            Ok(()) => {}
        }
        self.check();
    }

    fn is_broken(&self, asked: &Asked) -> bool {
        self.broken.contains(&asked.route.gsi())
    }

    fn open(&mut self) -> Result {
        let route = self.partition.new_route(None)?;
        let gsi = route.gsi();
        let taken: BTreeSet<_> = self.routes.iter().map(|asked| asked.route.gsi()).collect();
        let lowest = (24..32).find(|gsi| !taken.contains(gsi) && !self.broken.contains(gsi));
        assert_eq!(Some(gsi), lowest, "the lowest free GSI");
        self.routes.push(Asked { route, masked: false, msi: None });
        Ok(())
    }

    fn close(&mut self, at: usize) -> Result {
        if self.routes.is_empty() {
            return Ok(());
        }
        let closed = self.routes.swap_remove(at % self.routes.len());
        let gsi = closed.route.gsi();
        let result = closed.route.close();
        assert!(closed.route.is_closed());
        self.lapsed.remove(&gsi);
        if result.is_err() {
            self.broken.insert(gsi);
        }
        // What it says of itself is in `broken` already, and it asked of nobody else.
        result.map_err(|error| match error {
            Error::Failed(failure) => {
                assert_eq!((&failure.broken[..], &failure.disarmed[..]), (&[gsi][..], &[][..]));
                Failure { broken: Vec::new(), ..*failure }.into()
            }
            error => error,
        })
    }

    /// Makes changes, in a batch or alone, and says which GSIs they were about.
    fn commit(&mut self, edits: &[(usize, Edit)], batched: bool) -> (Result, Vec<u32>) {
        if self.routes.is_empty() {
            return (Ok(()), Vec::new());
        }
        let at = |at: usize| at % self.routes.len();
        let gsis: Vec<_> = edits.iter().map(|edit| self.routes[at(edit.0)].route.gsi()).collect();
        let result = if batched {
            let mut batch = Batch::new(Arc::clone(&self.partition)).unwrap();
            for (number, edit) in edits {
                let route = &self.routes[at(*number)].route;
                match edit {
                    Edit::Set(vector) => batch.set_msi(route, msi(*vector)),
                    Edit::Clear => batch.clear_msi(route),
                    Edit::Mask => batch.mask(route),
                    Edit::Unmask => batch.unmask(route),
                }
            }
            batch.commit()
        } else {
            let (number, edit) = edits[0];
            let route = &self.routes[at(number)].route;
            match edit {
                Edit::Set(vector) => route.set_msi(msi(vector)),
                Edit::Clear => route.clear_msi(),
                Edit::Mask => route.mask(),
                Edit::Unmask => route.unmask(),
            }
        };
        if result.is_ok() {
            let len = self.routes.len();
            for (number, edit) in edits {
                self.routes[number % len].edit(*edit);
            }
            self.lapsed.retain(|gsi| !gsis.contains(gsi));
        }
        (result, gsis)
    }

    fn check(&mut self) {
        for asked in &self.routes {
            let gsi = asked.route.gsi();
            let state = asked.route.state().unwrap();
            assert_eq!((asked.route.masked().unwrap(), asked.route.msi().unwrap()), (asked.masked, asked.msi));
            assert_eq!(state == GsiState::Broken, self.broken.contains(&gsi), "GSI {gsi}");
            if state == GsiState::Enabled {
                // The next push armed it, whoever asked for that.
                self.lapsed.remove(&gsi);
            }
            if state != GsiState::Broken {
                let armed = asked.should_be_armed() && !self.lapsed.contains(&gsi);
                assert_eq!(state == GsiState::Enabled, armed, "GSI {gsi}");
            }
        }
        for gsi in &self.broken {
            assert_eq!(self.partition.gsi_state(*gsi).unwrap(), GsiState::Broken);
        }
        // Nothing is registered that nobody knows of.
        let armed = self.recorder.kernel().armed.clone();
        for gsi in armed.difference(&self.broken) {
            assert_eq!(self.partition.gsi_state(*gsi).unwrap(), GsiState::Enabled, "GSI {gsi} is armed");
        }
        let routes: Vec<_> = self.routes.iter().map(|asked| asked.route.gsi()).collect();
        check_rules_of(
            &self.partition,
            &self.recorder,
            self.routes.iter().map(|asked| &asked.route),
            &format!("{routes:?}"),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_walk_with_any_failures_keeps_the_rules(quiesce: bool, steps in vec(steps(), 1..60)) {
        let mut walk = Walk::new(quiesce);
        for step in &steps {
            walk.step(step);
        }
        // What could not be disarmed so far goes with the partition.
        walk.recorder.fail([]);
        walk.partition.close().unwrap();
        prop_assert!(walk.recorder.kernel().armed.is_empty());
    }
}

//! Any steps on a partition whose kernel refuses any calls, against what the rules say of each outcome.
//!
//! `PROPTEST_CASES` sets the number of walks.

use std::cell::Cell;
use std::time::Instant;

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::hypervisor::Target;

#[derive(Clone, Copy, Debug)]
enum Edit {
    /// To data with a vector, for a VP.
    Set(u16, u8),
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
    CreateVp(u8),
    /// A new eventfd.
    Replace(usize),
    /// Each of these routes gets the eventfd of the one before it in the list, and the first a new one, or the last's.
    /// Other changes are in the batch.
    PassOn(Vec<usize>, bool, Vec<(usize, Edit)>),
    Signal(usize),
    Consume(usize),
    /// Other code closes the eventfd, as the kernel sees it: no call about it succeeds any more.
    CloseEvent(usize),
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
        12 => (0x20..0x28u16).prop_map(|data| Edit::Set(data, 0)),
        1 => (0x20..0x28u16, 1..3u8).prop_map(|(data, vp)| Edit::Set(data, vp)),
        // Of another shape, and of none: lowest-priority delivery, and NMIs.
        1 => (0x120..0x122u16).prop_map(|data| Edit::Set(data, 0)),
        2 => (0x400..0x403u16).prop_map(|data| Edit::Set(data, 0)),
        4 => Just(Edit::Clear),
        4 => Just(Edit::Mask),
        8 => Just(Edit::Unmask),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let deed = prop_oneof![
        4 => Just(Deed::New),
        2 => (0..8usize).prop_map(Deed::Close),
        10 => (0..8usize, edits()).prop_map(|(at, edit)| Deed::Change(at, edit)),
        8 => vec((0..8usize, edits()), 0..8).prop_map(Deed::Commit),
        1 => (1..3u8).prop_map(Deed::CreateVp),
        3 => (0..8usize).prop_map(Deed::Replace),
        5 => (vec(0..8usize, 1..4), any::<bool>(), vec((0..8usize, edits()), 0..3))
            .prop_map(|(routes, ring, edits)| Deed::PassOn(routes, ring, edits)),
        8 => (0..8usize).prop_map(Deed::Signal),
        1 => (0..8usize).prop_map(Deed::Consume),
        1 => (0..8usize).prop_map(Deed::CloseEvent),
    ];
    let failing = prop_oneof![
        3 => Just(BTreeSet::new()),
        2 => btree_set(0..7usize, 1..5),
        // A call of a quiesced push, after most of the disarming.
        2 => (2..10usize).prop_map(|number| BTreeSet::from([number])),
    ];
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
    /// Whether a signal came that has not become an interrupt yet.
    waiting: bool,
    /// Whether signals wait in two eventfds, one of which takes the place of the other: an interrupt each.
    in_two: bool,
    /// Its own messages, if a batch that failed was to give its eventfd with a signal to another route. That one may have
    /// raised its interrupt on the way; this one's is due all the same.
    due: Option<Vec<RawMsi>>,
    /// The messages that it may raise: the one set last, and during a step the one before.
    asked_for: Vec<RawMsi>,
}

fn to_vp(data: u16, vp: u8) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000 | u64::from(vp) << 12, data.into()).unwrap()
}

impl Asked {
    fn edit(&mut self, edit: Edit) {
        match edit {
            Edit::Set(data, vp) => self.msi = Some(to_vp(data, vp)),
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
    /// Whether a message that the kernel's table has never needs a push.
    always_moves: bool,
    recorder: Recorder,
    routes: Vec<Asked>,
    vps: BTreeSet<u8>,
    broken: BTreeSet<u32>,
    /// Routes that should be armed and could not be armed again.
    waiting_routes: BTreeSet<u32>,
}

impl Walk {
    fn new(setup: Setup) -> Self {
        let (partition, recorder) = partition_of(setup);
        Self {
            partition,
            always_moves: setup.entries_per_move == 0,
            recorder,
            routes: Vec::new(),
            vps: BTreeSet::from([0]),
            broken: BTreeSet::new(),
            waiting_routes: BTreeSet::new(),
        }
    }

    fn events(&self) -> BTreeMap<u32, EventId> {
        self.routes.iter().map(|asked| (asked.route.gsi(), event_of(&asked.route))).collect()
    }

    fn states(&self) -> BTreeMap<u32, GsiState> {
        self.routes.iter().map(|asked| (asked.route.gsi(), asked.route.state().unwrap())).collect()
    }

    fn step(&mut self, step: &Step) {
        let (before, events) = (self.states(), self.events());
        self.recorder.taken();
        self.recorder.fail(step.failing.iter().copied());
        self.recorder.kernel().drain_fails = step.drain_fails;
        let (result, touched) = match &step.deed {
            Deed::New => (self.open(), Vec::new()),
            Deed::Close(at) => (self.close(*at), Vec::new()),
            Deed::Change(at, edit) => self.commit(&[(*at, *edit)], false),
            Deed::Commit(edits) => self.commit(edits, true),
            Deed::CreateVp(index) => (self.create_vp(*index), Vec::new()),
            Deed::Replace(at) => self.pass_on(&[*at], false, &[]),
            Deed::PassOn(routes, ring, edits) => self.pass_on(routes, *ring, edits),
            Deed::Signal(at) => (self.signal(*at), Vec::new()),
            Deed::Consume(at) => (self.consume(*at), Vec::new()),
            Deed::CloseEvent(at) => (self.close_event(*at), Vec::new()),
        };
        let made = self.recorder.taken();
        let struck = step.failing.len() - self.recorder.kernel().failing.len();
        self.recorder.kernel().drain_fails = false;
        let closed_events = !self.recorder.kernel().closed_events.is_empty();
        let stuck = !self.recorder.kernel().stuck.is_empty();
        if result.is_err() && !matches!(step.deed, Deed::Close(_)) {
            assert_eq!(self.events(), events, "a failed call leaves the eventfds");
        }
        assert!(made.iter().filter(|call| matches!(call, Push(_))).count() <= if result.is_ok() { 1 } else { 2 });
        match result {
            Err(Error::Failed(failure)) => {
                assert!(
                    struck > 0 || step.drain_fails || closed_events || stuck,
                    "it failed although no call did: {failure}"
                );
                assert!(
                    failure.broken.iter().all(|gsi| touched.contains(gsi)),
                    "nothing was asked of {:?}, which it broke",
                    failure.broken
                );
                if struck == 1
                    && !step.drain_fails
                    && !closed_events
                    && !stuck
                    && !matches!(step.deed, Deed::Close(_))
                {
                    // But for what an earlier failure left disarmed: that may have come right on the way.
                    let mut after = self.states();
                    after.extend(self.waiting_routes.iter().map(|gsi| (*gsi, before[gsi])));
                    assert_eq!(after, before, "a single failure leaves all as it was");
                }
                self.broken.extend(&failure.broken);
                self.waiting_routes.extend(&failure.disarmed);
            }
            Err(Error::Broken(gsi)) => assert!(self.broken.contains(&gsi)),
            Err(Error::MissingVp { gsi, destination, .. }) => {
                assert!(!self.vps.contains(&destination) && gsi.is_some_and(|gsi| touched.contains(&gsi)));
                assert_eq!(made, [], "refused before any call");
            }
            Err(Error::Exhausted(_)) => {
                assert_eq!(
                    self.routes.iter().filter(|asked| !self.is_broken(asked)).count() + self.broken.len(),
                    8
                );
            }
            // A broken route may keep the eventfd that it was to have, while another route has it still.
            Err(Error::Invalid(text)) => assert!(stuck && text.contains("is the eventfd of the route"), "{text}"),
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
        self.routes.push(Asked {
            route,
            masked: false,
            msi: None,
            waiting: false,
            in_two: false,
            due: None,
            asked_for: Vec::new(),
        });
        Ok(())
    }

    fn create_vp(&mut self, index: u8) -> Result {
        if !self.vps.contains(&index) {
            self.partition.create_vp(index)?;
            self.vps.insert(index);
        }
        Ok(())
    }

    /// Signals a route as its device does: the kernel takes it if the irqfd is there.
    fn signal(&mut self, at: usize) -> Result {
        let len = self.routes.len();
        let Some(asked) = self.routes.get_mut(at % len.max(1)) else { return Ok(()) };
        asked.waiting = true;
        let mut kernel = self.recorder.kernel();
        if kernel.irqfds.contains_key(&event_of(&asked.route)) {
            kernel.raise(event_of(&asked.route));
            // With all that an arming has left, as the kernels' handlers do.
            asked.route.shared().event.consume().unwrap();
        } else {
            drop(kernel);
            asked.route.signal(1)?;
        }
        Ok(())
    }

    fn consume(&mut self, at: usize) -> Result {
        let len = self.routes.len();
        let Some(asked) = self.routes.get_mut(at % len.max(1)) else { return Ok(()) };
        assert_eq!(asked.route.consume_pending()?, asked.waiting);
        asked.waiting = false;
        Ok(())
    }

    fn close_event(&mut self, at: usize) -> Result {
        let len = self.routes.len();
        let Some(asked) = self.routes.get(at % len.max(1)) else { return Ok(()) };
        self.recorder.kernel().closed_events.insert(event_of(&asked.route));
        Ok(())
    }

    /// Each signal is pending still or has become one interrupt, and none came from nowhere.
    fn check_signals(&mut self) {
        let mut raised = std::mem::take(&mut self.recorder.kernel().raised);
        for asked in &mut self.routes {
            let gsi = asked.route.gsi();
            let came = raised.remove(&event_of(&asked.route)).unwrap_or_default();
            let pending = asked.route.pending().unwrap();
            let all = came.len() + usize::from(pending);
            let twice = asked.in_two || asked.due.is_some();
            assert!(
                all == usize::from(asked.waiting) || (twice && all == 2),
                "GSI {gsi}: {came:?} came, {pending}: {}",
                asked.waiting
            );
            asked.in_two = false;
            let right = came.iter().all(|msi| asked.asked_for.contains(msi));
            // A broken route may raise any, and so may the eventfd that one was to have.
            let stuck = self.recorder.kernel().stuck.contains(&event_of(&asked.route));
            let broken = self.broken.contains(&gsi) || stuck;
            assert!(right || broken, "GSI {gsi} raised {came:?}");
            let had = |own: Vec<_>| pending || came.iter().any(|msi| own.contains(msi));
            assert!(
                asked.due.take().is_none_or(had) || broken,
                "GSI {gsi} lost a signal to another route: {came:?}"
            );
            let left = asked.route.armed().unwrap() && asked.route.shared().event.get().is_readable().unwrap();
            assert!(!left, "GSI {gsi} is armed, and its counter is not empty");
            asked.waiting = pending;
            asked.asked_for = asked.msi.map(MsiRoute::raw).into_iter().collect();
        }
        assert_eq!(raised, BTreeMap::new(), "of routes that are not there");
    }

    fn close(&mut self, at: usize) -> Result {
        if self.routes.is_empty() {
            return Ok(());
        }
        let closed = self.routes.swap_remove(at % self.routes.len());
        let gsi = closed.route.gsi();
        let result = closed.route.close();
        assert!(closed.route.is_closed());
        self.waiting_routes.remove(&gsi);
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
        let len = self.routes.len();
        for (number, edit) in edits {
            if let Edit::Set(data, vp) = edit {
                self.routes[number % len].asked_for.push(to_vp(*data, *vp).raw());
            }
        }
        let table = self.recorder.kernel().table.clone();
        let at = |at: usize| at % len;
        let gsis: Vec<_> = edits.iter().map(|edit| self.routes[at(edit.0)].route.gsi()).collect();
        let result = if batched {
            let mut batch = Batch::new(Arc::clone(&self.partition)).unwrap();
            for (number, edit) in edits {
                let route = &self.routes[at(*number)].route;
                match edit {
                    Edit::Set(data, vp) => batch.set_msi(route, to_vp(*data, *vp)),
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
                Edit::Set(data, vp) => route.set_msi(to_vp(data, vp)),
                Edit::Clear => route.clear_msi(),
                Edit::Mask => route.mask(),
                Edit::Unmask => route.unmask(),
            }
        };
        if result.is_ok() {
            for (number, edit) in edits {
                self.routes[number % len].edit(*edit);
            }
            self.waiting_routes.retain(|gsi| !gsis.contains(gsi));
            self.check_need(&gsis, &table);
        }
        (result, gsis)
    }

    /// Passes eventfds on in a batch, and says which GSIs it was about.
    fn pass_on(&mut self, numbers: &[usize], ring: bool, edits: &[(usize, Edit)]) -> (Result, Vec<u32>) {
        if self.routes.is_empty() {
            return (Ok(()), Vec::new());
        }
        let len = self.routes.len();
        let mut places = Vec::new();
        for place in numbers.iter().map(|number| number % len) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        let gsis = places.iter().copied().chain(edits.iter().map(|(number, _)| number % len));
        let gsis: Vec<_> = gsis.map(|place| self.routes[place].route.gsi()).collect();
        for (number, edit) in edits {
            if let Edit::Set(data, vp) = edit {
                self.routes[number % len].asked_for.push(to_vp(*data, *vp).raw());
            }
        }
        let from = |at: usize| if at > 0 { Some(places[at - 1]) } else { places.last().copied().filter(|_| ring) };
        let own: Vec<_> = self.routes.iter().map(|asked| asked.asked_for.clone()).collect();
        // What an eventfd holds may become the interrupt of its new route, also if the batch fails later.
        for (at, place) in places.iter().enumerate() {
            let messages = self.routes[*place].asked_for.clone();
            from(at).into_iter().for_each(|giver| self.routes[giver].asked_for.extend(&messages));
        }
        let mut batch = Batch::new(Arc::clone(&self.partition)).unwrap();
        for (at, place) in places.iter().enumerate() {
            let event = from(at)
                .map_or_else(|| NewEvent::make(None).unwrap(), |giver| duplicate(&self.routes[giver].route));
            batch.set_event(&self.routes[*place].route, event);
        }
        for (number, edit) in edits {
            let route = &self.routes[number % len].route;
            match edit {
                Edit::Set(data, vp) => batch.set_msi(route, to_vp(*data, *vp)),
                Edit::Clear => batch.clear_msi(route),
                Edit::Mask => batch.mask(route),
                Edit::Unmask => batch.unmask(route),
            }
        }
        let result = batch.commit();
        if result.is_ok() {
            edits.iter().for_each(|(number, edit)| self.routes[number % len].edit(*edit));
            self.waiting_routes.retain(|gsi| !gsis.contains(gsi));
            let waiting: Vec<_> = places.iter().map(|place| self.routes[*place].waiting).collect();
            let last = places.len() - 1;
            for (at, place) in places.iter().enumerate() {
                let moved =
                    from(at).is_some_and(|giver| waiting[places.iter().position(|one| *one == giver).unwrap()]);
                // The last one's goes to nobody, so it is carried over. A ring of one is no change.
                let carried = at == last && waiting[last] && (!ring || last == 0);
                let asked = &mut self.routes[*place];
                asked.waiting = moved || carried;
                asked.in_two = moved && carried && last > 0;
            }
            self.settle(&places);
        } else {
            for giver in (0..places.len()).filter_map(from) {
                let asked = &mut self.routes[giver];
                asked.due = Some(own[giver].clone()).filter(|_| asked.waiting);
            }
        }
        (result, gsis)
    }

    /// Delivers what was carried over to armed eventfds. A broken route may have an undrained one, which stays as it is.
    fn settle(&self, places: &[usize]) {
        for asked in places.iter().map(|place| &self.routes[*place]) {
            let (event, mut kernel) = (event_of(&asked.route), self.recorder.kernel());
            if kernel.irqfds.contains_key(&event) && asked.route.shared().event.consume().unwrap() != 0 {
                kernel.raise(event);
            }
        }
    }

    /// A change whose messages the kernel's table had all makes no push, and no call about other routes.
    fn check_need(&self, changed: &[u32], table: &BTreeMap<u32, RawMsi>) {
        let changed: BTreeSet<_> = changed.iter().copied().collect();
        let had = |asked: &Asked| {
            let (gsi, msi) = (asked.route.gsi(), asked.msi.map(MsiRoute::raw));
            !asked.should_be_armed()
                || table.get(&gsi).copied() == msi
                || table.range(FIRST_SPARE..).any(|(_, loaded)| Some(*loaded) == msi)
        };
        let mut asked = self.routes.iter().filter(|asked| changed.contains(&asked.route.gsi()));
        if self.always_moves && asked.all(had) {
            let calls = &self.recorder.kernel().calls;
            let needless = calls.iter().any(|call| matches!(call, Push(_))) || calls.len() > 2 * changed.len();
            assert!(!needless, "GSIs {changed:?} asked for messages that the table had: {calls:?}");
        }
    }

    fn check(&mut self) {
        // A route whose eventfd was closed while it was armed breaks when others push, and no call says so.
        let closed_events = self.recorder.kernel().closed_events.clone();
        let closed = self.routes.iter().filter(|asked| closed_events.contains(&event_of(&asked.route)));
        let broken = closed.filter(|asked| asked.route.state().unwrap() == GsiState::Broken);
        self.broken.extend(broken.map(|asked| asked.route.gsi()));
        self.check_signals();
        for asked in &self.routes {
            let gsi = asked.route.gsi();
            let state = asked.route.state().unwrap();
            assert_eq!((asked.route.masked().unwrap(), asked.route.msi().unwrap()), (asked.masked, asked.msi));
            assert_eq!(state == GsiState::Broken, self.broken.contains(&gsi), "GSI {gsi}");
            if state == GsiState::Enabled {
                // The next push armed it, whoever asked for that.
                self.waiting_routes.remove(&gsi);
            }
            if state != GsiState::Broken {
                let armed = asked.should_be_armed() && !self.waiting_routes.contains(&gsi);
                assert_eq!(state == GsiState::Enabled, armed, "GSI {gsi}");
                let destination = asked.msi.map_or(0, |msi| msi.target().destination);
                assert!(!armed || self.vps.contains(&destination), "GSI {gsi} is armed for a VP that is not there");
            }
        }
        for gsi in &self.broken {
            assert_eq!(self.partition.gsi_state(*gsi).unwrap(), GsiState::Broken);
        }
        // Nothing is registered that is not known: an irqfd of no open route belongs to a broken GSI.
        let open: BTreeSet<_> = self.routes.iter().map(|asked| event_of(&asked.route)).collect();
        let unknown = self.recorder.kernel().irqfds.keys().filter(|event| !open.contains(event)).count();
        assert!(unknown <= self.broken.len(), "{unknown} irqfds are armed that belong to no route");
        // No message is loaded for a VP that is not there.
        for (gsi, msi) in &self.recorder.kernel().table {
            let destination = Target::decode(*msi).destination;
            assert!(self.vps.contains(&destination), "GSI {gsi} has {msi:?}, which no VP can take");
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

#[test]
fn any_walk_with_any_failures_keeps_the_rules() {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let (walks, made, failed, began) = (Cell::new(0), Cell::new(0), Cell::new(0), Instant::now());
    let any = (prop::sample::select(&SETUPS[..]), vec(steps(), 1..60));
    let result = TestRunner::new(config).run(&any, |(setup, steps)| {
        let mut walk = Walk::new(setup);
        for step in &steps {
            walk.step(step);
        }
        walks.set(walks.get() + 1);
        made.set(made.get() + steps.len());
        failed.set(failed.get() + walk.partition.stats().unwrap().failures);
        // What could not be disarmed so far goes with the partition.
        walk.recorder.fail([]);
        let closed = walk.partition.close();
        let kernel = walk.recorder.kernel();
        prop_assert!(kernel.irqfds.keys().all(|event| kernel.closed_events.contains(event)));
        prop_assert!(closed.is_ok() || !kernel.irqfds.is_empty());
        Ok(())
    });
    println!(
        "{} walks, {} steps, {} calls failed, {:.1} s",
        walks.get(),
        made.get(),
        failed.get(),
        began.elapsed().as_secs_f64()
    );
    result.unwrap_or_else(|error| panic!("{error}"));
}

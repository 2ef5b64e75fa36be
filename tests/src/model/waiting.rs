//! Page requests, side by side.

use viommu_device::soft::{Answer, Ticket};

use super::asking::{Ask, Key, Scene, Seen, Wait};
use super::harness::Harness;
use super::layout::Tables;
use super::op::{Op, Twist};
use super::subject::{Subject, View};
use super::words::{Access, Context, Kind, Space};
use super::world::Hardware;
use super::{Binding, Domain, Model};

impl<S: Subject> Harness<S> {
    /// Compares what the device did with its machine, and what became of the accesses that wait.
    pub(super) fn settle(&mut self, scene: Scene) {
        let scene = Scene { is_negotiated: self.model.asks(), ..scene };
        let open = self.subject.with_device(|device| device.view().open);
        let seen = self.subject.with_device(|device| device.seen());
        // What was taken over since has its answer from the device.
        let is_taken = |wait: &Wait| {
            let is_it = |ask: &Ask| {
                (ask.id, ask.pasid) == (wait.id, wait.pasid)
                    && match (wait.access, wait.made_up) {
                        (Some((iova, _)), _) => ask.address == iova,
                        (None, made_up) => ask.number == made_up.map(|(group, _)| group),
                    }
            };
            seen.iter().any(|seen| matches!(seen, Seen::Taken(ask) if is_it(ask)))
        };
        for number in std::mem::take(&mut self.model.asking.doubtful) {
            let Some(wait) = self.model.asking.waits.get(&number) else { continue };
            let is_gone = match (self.tickets.get(&number), wait.made_up) {
                (Some(&ticket), _) => self.subject.with_device(|device| device.answer(ticket)).is_some(),
                (None, Some((group, _))) => !open.contains(&(wait.id, wait.pasid, group)),
                (None, None) => false,
            };
            if is_gone && !is_taken(wait) {
                self.model.asking.gone(number);
            }
        }
        let faults = self.model.asking.saw(&seen, scene).unwrap_or_else(|why| panic!("{why}\n{seen:?}"));
        for (Ask { id, pasid, address, flags, .. }, is_quiet) in faults {
            let kind = match flags {
                _ if flags & 2 != 0 => Kind::Write,
                _ if flags & 4 != 0 => Kind::Execute,
                _ => Kind::Read,
            };
            let access = Access { kind, privileged: flags & 8 != 0 };
            self.model.record_refusal(id, pasid, address, access, is_quiet);
        }
        let model = &mut self.model;
        self.tickets.retain(|number, &mut ticket| {
            let outcome = model.asking.waits.get(number).and_then(|wait| wait.outcome);
            let given = self.subject.with_device(|device| device.answer(ticket));
            let wanted = outcome.map(|again| if again { Answer::Retry } else { Answer::Failed });
            assert_eq!(given, wanted, "what became of {:?}", model.asking.waits.get(number));
            outcome.is_none()
        });
        model.asking.waits.retain(|_, wait| wait.outcome.is_none());
    }

    pub(super) fn check_asking(&self, view: &View) {
        let asking = &self.model.asking;
        let counts = view.counts;
        let given = (counts.requests, counts.groups);
        assert_eq!(given, asking.counts(), "requests and groups that are not over");
        let given = [counts.refused, counts.timed_out, counts.buffer_too_small];
        assert_eq!(given, asking.refused, "refused, timed out, too small a buffer");
        let open = asking.waits.values().filter_map(|wait| Some((wait.id, wait.pasid, wait.made_up?.0)));
        let mut open: Vec<Key> = open.collect();
        open.sort_unstable();
        assert_eq!(view.open, open, "groups that a machine made up");
        // To be asked early is no mistake, to be asked late is one.
        let is_right = match (view.due, asking.due_at()) {
            (None, None) => true,
            (Some(_), None) => !asking.groups.is_empty() && self.model.world.timeout != u64::MAX,
            (Some(given), Some(wanted)) => given <= wanted,
            _ => false,
        };
        assert!(is_right, "due {:?}, wanted {:?}", view.due, asking.due_at());
    }

    pub(super) fn begin_to_wait(
        &mut self,
        id: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access,
        ticket: Ticket,
        is_quiet: bool,
    ) {
        let asking = &mut self.model.asking;
        match asking.joined(id, pasid, iova, access) {
            Some(number) => {
                assert_eq!(self.tickets.get(&number), Some(&ticket), "one page, one ticket");
                *asking.tally.entry("accesses that joined").or_default() += 1;
            }
            None => {
                assert!(self.tickets.values().all(|known| *known != ticket), "a ticket of another page");
                let number = asking.wait(id, pasid, iova, access, is_quiet);
                self.tickets.insert(number, ticket);
            }
        }
    }

    pub(super) fn set_time(&mut self, by: i64) {
        let time = self.model.asking.now.saturating_add_signed(by);
        self.subject.with_device(|device| device.set_time(time));
        self.settle(Scene { time: Some(time), ..Scene::default() });
    }

    pub(super) fn answer(&mut self, which: usize, twist: Twist, code: u16) {
        let groups = &self.model.asking.groups;
        // Rather one that may be answered.
        let answerable: Vec<Key> =
            groups.iter().filter(|group| group.is_answerable()).map(|group| group.key).collect();
        let keys = match answerable.is_empty() || which % 4 == 3 {
            true => groups.iter().map(|group| group.key).collect(),
            false => answerable,
        };
        let key = if keys.is_empty() { (8, None, 0) } else { keys[which / 4 % keys.len()] };
        let key = match (twist, self.model.asking.answered) {
            (Twist::Pasid(pasid), _) => (key.0, Some(pasid), key.2),
            (Twist::Tagged, _) => (key.0, if key.1.is_none() { Some(0) } else { None }, key.2),
            (Twist::Group(by), _) => (key.0, key.1, key.2.wrapping_add(by)),
            (Twist::Endpoint(id), _) => (id, key.1, key.2),
            (Twist::Again, Some(answered)) => answered,
            (Twist::None | Twist::Bit(_) | Twist::Again, _) => key,
        };
        let mut readable = page_response(key, code);
        if let Twist::Bit(bit) = twist {
            readable[bit / 8 % 28] ^= 1 << (bit % 8);
        }
        self.request(&readable, 4, 1);
    }

    /// The driver at its best.
    pub(super) fn serve(&mut self, which: usize) {
        let groups = self.model.asking.groups.iter().filter(|group| group.is_answerable());
        let asked: Vec<(Key, Ask)> =
            groups.filter_map(|group| Some((group.key, group.first()?.clone()))).collect();
        if asked.is_empty() {
            return;
        }
        let (key, ask) = asked[which % asked.len()].clone();
        if let Some(tables) = self.model.tables_of(ask.id, ask.pasid) {
            let (region, page) = (ask.address >> 21 & 1, ask.address >> 12 & 0x1ff);
            let table = tables.pages(region, 0);
            self.write(tables.region(region), &[tables.link(table)]);
            let output = crate::rig::Memory::BASE + ((page % 8) << 12);
            self.write(table + 8 * page, &[tables.leaf(output, false)]);
        }
        self.request(&page_response(key, 0), 4, 1);
        let kind = match ask.flags {
            flags if flags & 2 != 0 => Kind::Write,
            flags if flags & 4 != 0 => Kind::Execute,
            _ => Kind::Read,
        };
        let access = Access { kind, privileged: ask.flags & 8 != 0 };
        self.access(ask.id, ask.pasid, ask.address, access, true);
    }

    pub(super) fn make_up(&mut self, op: &Op) {
        let &Op::MakeUp { id, pasid, group, last, flags, private } = op else { return };
        let may_wait = self.model.world.endpoint(id).is_some_and(|spec| spec.waits);
        if !may_wait || !self.model.has_table(id, pasid) {
            return;
        }
        let address = 0x7_0000_0000 | u64::from(group) << 12;
        // Numbers that accesses of software do not reach.
        let number = Some(group | 0x8000);
        let ask = Ask { id, pasid, address, flags, last, private, number };
        if self.model.asking.make_up(&ask) {
            self.subject.with_device(|device| device.make_up(ask));
        }
    }

    pub(super) fn forget(&mut self, which: usize) {
        let keys = self.model.asking.forgettable();
        if !keys.is_empty() {
            let key = keys[which % keys.len()];
            self.subject.with_device(|device| device.forget(key));
            self.model.asking.forget(key);
        }
    }
}

fn page_response((id, pasid, group): Key, code: u16) -> Vec<u8> {
    let words = [8, id, pasid.is_some().into(), pasid.unwrap_or(0)];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(group.to_le_bytes());
    bytes.extend(code.to_le_bytes());
    bytes.resize(28, 0);
    bytes
}

impl Model {
    /// Whether accesses go through a guest's table.
    fn has_table(&self, id: u32, pasid: Option<u32>) -> bool {
        let Some(endpoint) = self.endpoints.get(&id) else { return false };
        let is_table = endpoint.domain.is_some_and(|domain| matches!(self.domains[&domain], Domain::Table));
        is_table
            && match &endpoint.binding {
                Binding::None => false,
                Binding::CdTable(_) | Binding::Directory(..) => true,
                Binding::Pages(pages) => pages.contains_key(&pasid.unwrap_or(0)),
            }
    }

    /// The page tables that accesses go through, as far as they are those of the layout.
    fn tables_of(&self, id: u32, pasid: Option<u32>) -> Option<Tables> {
        let is_vtd = matches!(self.world.endpoint(id)?.tables, Hardware::Vtd { .. });
        let context = match &self.endpoints.get(&id)?.binding {
            Binding::Pages(pages) => pages.get(&pasid.unwrap_or(0)).copied(),
            Binding::Directory(table, Some(bound)) => bound.get(&pasid.unwrap_or(table.untagged)).copied(),
            _ => self.endpoints.get(&id)?.seen.contexts(pasid).last().map(|(_, context)| context),
        };
        match context? {
            Context::Tables(Space::Arm { root, .. } | Space::Vtd { root, .. }) => Tables::of(is_vtd, root),
            Context::Bypass | Context::Unknown => None,
        }
    }
}

//! What the device does with page requests, and whether it may.

use super::{Ask, Asking, Group, INVALID, Key, Scene, Seen};

impl Asking {
    /// What the device did with its machine. Gives the requests that it made into faults, with whether it may
    /// keep them to itself.
    ///
    /// # Errors
    /// What it must not do, or has to do and did not.
    pub fn saw(&mut self, all: &[Seen], scene: Scene) -> Result<Vec<(Ask, bool)>, String> {
        let mut faults = Vec::new();
        // Of the request that was taken last, when it has to be refused.
        let mut refusal: Option<(Key, u64)> = None;
        let mut answers = Vec::new();
        let mut taken = 0;
        for seen in all {
            let (key, code) = match seen {
                Seen::Taken(ask) => {
                    check(refusal.is_none(), || format!("{refusal:?} was not refused"))?;
                    taken += 1;
                    refusal = self.taken(ask, scene, &mut faults)?;
                    continue;
                }
                &Seen::Answered(key, code) | &Seen::Gone(key, code) | &Seen::Failed(key, code) => (key, code),
            };
            let is_failed = matches!(seen, Seen::Failed(..));
            if is_failed {
                self.fails = false;
            }
            if let Some((refused, number)) = refusal.take() {
                check((key, code) == (refused, INVALID), || {
                    format!("{seen:?}, and {refused:?} was to be refused")
                })?;
                self.needs_reset |= is_failed;
                if !is_failed {
                    self.end(number, false);
                }
            } else if self.given.as_ref() == Some(seen) {
                self.given = None;
            } else {
                check(code == INVALID, || format!("{seen:?} of its own"))?;
                self.needs_reset |= is_failed;
                answers.push((key, is_failed));
            }
        }
        check(refusal.is_none(), || format!("{refusal:?} was not refused"))?;
        let missing = self.given.take();
        check(missing.is_none(), || format!("the machine was not told {missing:?}"))?;
        let looks = scene.time.is_some() || scene.buffer.is_some();
        let has_all = self.in_machine() == 0 || self.is_choked() || taken >= self.in_all;
        check(!looks || has_all, || "what is in the machine was not taken over".into())?;

        answers.retain(|(key, _)| !self.closing.contains(key));
        self.closing.clear();
        if let Some(time) = scene.time {
            self.pass(time);
        }
        if let (Some(len), &[(key, is_failed)]) = (scene.buffer, answers.as_slice()) {
            self.too_small(len, key, is_failed)?;
            return Ok(faults);
        }
        for (key, why) in std::mem::take(&mut self.due) {
            let place = answers.iter().position(|(answered, _)| *answered == key);
            let Some(place) = place else { return Err(format!("{key:?} was not {why}")) };
            let (_, is_failed) = answers.remove(place);
            self.count(why);
            self.over(key, is_failed);
        }
        check(answers.is_empty(), || format!("answered without a reason: {answers:?}"))?;
        Ok(faults)
    }

    /// The driver was told of a page request, in these bytes. `fault_left`: a fault still waits for a buffer.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn tell(&mut self, record: &[u8; 48], fault_left: bool) -> Result<(), String> {
        let le32 =
            |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let flags = le32(4);
        let pasid = (flags & 0x200 != 0).then(|| le32(12));
        let key = (le32(8), pasid, u16::from_le_bytes([record[24], record[25]]));
        let group = self.groups.iter_mut().find(|group| group.key == key);
        let Some(group) = group else { return Err(format!("told of {key:?}, which is no group")) };
        // Those of one group come in order.
        let Some((ask, told, _)) = group.asks.iter_mut().find(|(_, told, _)| !*told) else {
            return Err(format!("told of {key:?} once more"));
        };
        let wanted = event(ask, key);
        check(*record == wanted, || format!("told\n {record:02x?}, to tell was\n {wanted:02x?}"))?;
        *told = true;
        let is_last = ask.last;
        // nobody has two turns while somebody waits for the first.
        let before = self.turns.get(&key.0).copied().unwrap_or(0);
        for other in self.groups.iter().filter(|other| other.key.0 != key.0) {
            let untold = other.asks.iter().filter(|(_, told, _)| !told).map(|&(.., since)| since).min();
            let turn = self.turns.get(&other.key.0).copied().unwrap_or(0);
            let starved = untold.is_some_and(|since| since.max(turn) < before);
            check(!starved, || format!("endpoint {} has two turns, and {:?} none", key.0, other.key))?;
        }
        if let Some((false, _, true)) = self.last_event {
            return Err("two page requests, and a fault waits".into());
        }
        self.tick += 1;
        self.turns.insert(key.0, self.tick);
        self.last_event = Some((false, self.tick, fault_left));
        self.count(if is_last { "told, last of a group" } else { "told, not the last" });
        Ok(())
    }

    /// The driver was told of a fault.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn told_fault(&mut self) -> Result<(), String> {
        if let Some((true, before, _)) = self.last_event {
            let waits = |(_, told, since): &(Ask, bool, u64)| !told && *since < before;
            let starved = self.groups.iter().any(|group| group.asks.iter().any(waits));
            check(!starved, || "two faults, and a page request waits".into())?;
        }
        self.tick += 1;
        self.last_event = Some((true, self.tick, false));
        Ok(())
    }

    /// A group is over by the device's answer.
    fn over(&mut self, key: Key, is_failed: bool) {
        let Some(place) = self.groups.iter().position(|group| group.key == key) else { return };
        let group = self.groups.remove(place);
        if !is_failed && !group.is_gone {
            self.end(group.wait, false);
        }
    }

    /// Whether the device is to take nothing over: its bound for all is reached, and the driver was not told of all.
    fn is_choked(&self) -> bool {
        self.counts().0 >= self.in_all && self.has_untold()
    }

    /// The device took a request over; says whether it is to be refused at once.
    fn taken(
        &mut self,
        ask: &Ask,
        scene: Scene,
        faults: &mut Vec<(Ask, bool)>,
    ) -> Result<Option<(Key, u64)>, String> {
        let is_choked = self.is_choked() && scene.is_negotiated && !scene.is_reset;
        check(!is_choked, || format!("took {ask:?} over without room"))?;
        let is_made_up = !self.made_up.is_empty();
        let queue = if is_made_up { &mut self.made_up } else { &mut self.accesses };
        let Some((wait, wanted)) = queue.pop_front() else {
            return Err(format!("the machine asks {ask:?}"));
        };
        let Some(number) = ask.number else { return Err("a request without a group".into()) };
        let wanted = Ask { number: wanted.number.or(Some(number)), ..wanted };
        check(*ask == wanted, || format!("the machine asks {ask:?}, not {wanted:?}"))?;
        let is_new = is_made_up || self.numbers.insert((ask.id, number));
        check(is_new, || format!("number {number} is used again"))?;
        let key = (ask.id, ask.pasid, number);
        if scene.is_reset {
            return Ok(Some((key, wait)));
        }
        if !scene.is_negotiated {
            self.count("closed, not negotiated");
            faults.push((ask.clone(), self.waits.get(&wait).is_some_and(|wait| wait.is_quiet)));
            return Ok(Some((key, wait)));
        }
        let place = self.groups.iter().position(|group| group.key == key);
        let place = match place {
            // Its name is used again: the machine answered it by itself.
            Some(place) if self.groups[place].is_whole => {
                self.count("names that are used again");
                self.groups.remove(place);
                None
            }
            place => place,
        };
        let of_endpoint: usize =
            self.groups.iter().filter(|group| group.key.0 == ask.id).map(|group| group.asks.len()).sum();
        if of_endpoint >= self.per_endpoint || self.counts().0 >= self.in_all {
            self.count(if of_endpoint >= self.per_endpoint {
                "closed by the bound of an endpoint"
            } else {
                "closed by the bound of all"
            });
            if let Some(place) = place {
                self.count("closed by a bound while gathering");
                self.groups.remove(place);
            }
            self.refused[0] += 1;
            return Ok(Some((key, wait)));
        }
        self.tick += 1;
        let asked = (ask.clone(), false, self.tick);
        match place {
            Some(place) => {
                self.groups[place].asks.push(asked);
                self.groups[place].is_whole = ask.last;
            }
            None => {
                let asks = vec![asked];
                self.groups.push(Group { key, wait, asks, is_whole: ask.last, since: None, is_gone: false });
            }
        }
        self.count("taken over");
        Ok(None)
    }

    /// It is `time`, unless it is later already. The time of a group counts from the first time that finds it.
    fn pass(&mut self, time: u64) {
        self.now = self.now.max(time);
        for group in &mut self.groups {
            let since = *group.since.get_or_insert(self.now);
            let due = since.saturating_add(self.timeout);
            if due != u64::MAX && due <= self.now {
                self.refused[1] += 1;
                self.due.push((group.key, "closed by time"));
            }
        }
    }

    /// A buffer was too small for a page request.
    fn too_small(&mut self, len: usize, key: Key, is_failed: bool) -> Result<(), String> {
        let group = self.groups.iter().find(|group| group.key == key);
        let is_untold = group.is_some_and(|group| group.asks.iter().any(|(_, told, _)| !told));
        check(is_untold && len < 48, || format!("{key:?} was answered, with a buffer of {len} bytes"))?;
        self.count("closed by a small buffer");
        self.refused[2] += 1;
        self.over(key, is_failed);
        Ok(())
    }
}

/// What the driver has to be told.
fn event(ask: &Ask, key: Key) -> [u8; 48] {
    let mut record = [0; 48];
    let mut flags = ask.flags | 0x20 | 0x100 | 0x400;
    flags |= if ask.last { 0x10 } else { 0 };
    flags |= if ask.pasid.is_some() { 0x200 } else { 0 };
    flags |= if ask.private.is_some() { 0x800 } else { 0 };
    record[0] = 2;
    record[4..8].copy_from_slice(&flags.to_le_bytes());
    record[8..12].copy_from_slice(&ask.id.to_le_bytes());
    record[12..16].copy_from_slice(&ask.pasid.unwrap_or(0).to_le_bytes());
    record[16..24].copy_from_slice(&ask.address.to_le_bytes());
    record[24..26].copy_from_slice(&key.2.to_le_bytes());
    let [first, second] = ask.private.unwrap_or_default();
    record[32..40].copy_from_slice(&first.to_le_bytes());
    record[40..48].copy_from_slice(&second.to_le_bytes());
    record
}

fn check(is_right: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if is_right { Ok(()) } else { Err(why()) }
}

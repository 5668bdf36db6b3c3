//! Which slots are free, warm, in the making or held. Pure bookkeeping, in memory; the lease table and the kernel are
//! what it is rebuilt from at start.
//!
//! ```text
//!            reserve_missing          made                 take
//!   cold ------------------> making --------> warm (FIFO) ------> held
//!    ^                          |  (failed)                         |
//!    +--------------------------+-----------------------------------+
//!                              unmake
//! ```
//! Cold slots are made in turn, by a cursor that goes round, and warm ones are taken in the order they were made: so the
//! address of a deleted VM stays unused for as long as possible, and late packets for it reach nobody.

use std::collections::{BTreeSet, VecDeque};

/// The books.
#[derive(Debug, Clone)]
pub struct Slots {
    capacity: u32,
    cursor: u32,
    warm: VecDeque<u32>,
    making: BTreeSet<u32>,
    held: BTreeSet<u32>,
}

impl Slots {
    /// All of `capacity` slots cold, but for those that leases hold and those that were found warm.
    pub fn new(
        capacity: u32,
        held: impl IntoIterator<Item = u32>,
        warm: impl IntoIterator<Item = u32>,
    ) -> Self {
        let held: BTreeSet<u32> = held.into_iter().collect();
        let warm: BTreeSet<u32> = warm.into_iter().filter(|n| !held.contains(n)).collect();
        let cursor = held.iter().chain(&warm).copied().max().unwrap_or(0);
        Self { capacity, cursor, warm: warm.into_iter().collect(), making: BTreeSet::new(), held }
    }

    /// Takes the slot that has been warm longest.
    pub fn take(&mut self) -> Option<u32> {
        let number = self.warm.pop_front()?;
        self.held.insert(number);
        Some(number)
    }

    /// Takes a cold slot to make it; `None` where every slot is taken.
    pub fn reserve(&mut self) -> Option<u32> {
        let free = |n: &u32| !self.warm.contains(n) && !self.making.contains(n) && !self.held.contains(n);
        let number =
            (self.cursor + 1..=self.capacity).chain(1..=self.cursor.min(self.capacity)).find(free)?;
        self.cursor = number;
        self.making.insert(number);
        Some(number)
    }

    /// Takes as many cold slots as `target` warm ones want, counting those in the making.
    pub fn reserve_missing(&mut self, target: u32) -> Vec<u32> {
        let have = self.warm.len() + self.making.len();
        let want = usize::try_from(target).unwrap_or(usize::MAX).saturating_sub(have);
        (0..want).map_while(|_| self.reserve()).collect()
    }

    /// A slot in the making is warm now.
    pub fn made(&mut self, number: u32) {
        if self.making.remove(&number) {
            self.warm.push_back(number);
        }
    }

    /// A slot in the making goes to a VM at once.
    pub fn made_and_taken(&mut self, number: u32) {
        if self.making.remove(&number) {
            self.held.insert(number);
        }
    }

    /// A held slot whose VM never got it is warm again, and first in line.
    pub fn put_back(&mut self, number: u32) {
        if self.held.remove(&number) {
            self.warm.push_front(number);
        }
    }

    /// The slot is cold: its device is gone.
    pub fn unmake(&mut self, number: u32) {
        self.making.remove(&number);
        self.held.remove(&number);
        self.warm.retain(|n| *n != number);
    }

    /// How many are warm.
    pub fn warm(&self) -> u32 {
        u32::try_from(self.warm.len()).unwrap_or(u32::MAX)
    }

    /// How many VMs hold.
    pub fn held(&self) -> u32 {
        u32::try_from(self.held.len()).unwrap_or(u32::MAX)
    }

    /// The warm and the held ones: those that should have a device.
    pub fn present(&self) -> BTreeSet<u32> {
        self.warm.iter().chain(&self.held).copied().collect()
    }

    /// Whether the slot is warm.
    pub fn is_warm(&self, number: u32) -> bool {
        self.warm.contains(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Is {
        Making,
        Warm,
        Held,
    }

    proptest! {
        /// Against a plain map as the model: no slot is ever in two places, none outside the capacity, none given twice,
        /// none lost, and a full pool is full only when every slot is in use.
        #[test]
        fn a_slot_is_in_one_place(capacity in 1_u32..20, steps in prop::collection::vec((0_u8..6, 0_usize..20), 0..200)) {
            let mut slots = Slots::new(capacity, [], []);
            let mut model: BTreeMap<u32, Is> = BTreeMap::new();
            for (what, pick) in steps {
                let nth = |is: Is, model: &BTreeMap<u32, Is>| {
                    let all: Vec<u32> = model.iter().filter(|(_, i)| **i == is).map(|(n, _)| *n).collect();
                    (!all.is_empty()).then(|| all[pick % all.len()])
                };
                match what {
                    0 => match slots.take() {
                        Some(n) => prop_assert_eq!(model.insert(n, Is::Held), Some(Is::Warm)),
                        None => prop_assert!(nth(Is::Warm, &model).is_none()),
                    },
                    1 => match slots.reserve() {
                        Some(n) => {
                            prop_assert!((1..=capacity).contains(&n));
                            prop_assert_eq!(model.insert(n, Is::Making), None);
                        }
                        None => prop_assert_eq!(model.len(), capacity as usize),
                    },
                    2 => if let Some(n) = nth(Is::Making, &model) { slots.made(n); model.insert(n, Is::Warm); },
                    3 => if let Some(n) = nth(Is::Making, &model) { slots.made_and_taken(n); model.insert(n, Is::Held); },
                    4 => if let Some(n) = nth(Is::Held, &model) { slots.put_back(n); model.insert(n, Is::Warm); },
                    _ => if let Some(n) = nth(Is::Held, &model) { slots.unmake(n); model.remove(&n); },
                }
                let count = |is| model.values().filter(|i| **i == is).count() as u32;
                prop_assert_eq!((slots.warm(), slots.held()), (count(Is::Warm), count(Is::Held)));
                let present: BTreeSet<u32> = model.iter().filter(|(_, i)| **i != Is::Making).map(|(n, _)| *n).collect();
                prop_assert_eq!(slots.present(), present);
            }
        }
    }

    #[test]
    fn a_returned_slot_is_used_again_last() {
        let mut slots = Slots::new(4, [], []);
        for n in slots.reserve_missing(2) {
            slots.made(n);
        }
        let first = slots.take().unwrap();
        slots.unmake(first);
        let mut order = Vec::new();
        while let Some(n) = slots.take().or_else(|| slots.reserve().inspect(|n| slots.made_and_taken(*n))) {
            order.push(n);
        }
        assert_eq!(order, [2, 3, 4, 1]);
    }

    #[test]
    fn a_restart_keeps_what_it_finds() {
        let mut slots = Slots::new(10, [2, 5], [1, 2]);
        assert_eq!((slots.warm(), slots.held()), (1, 2));
        assert_eq!(slots.reserve_missing(3), [6, 7]);
        assert_eq!(slots.reserve_missing(3), [] as [u32; 0], "those in the making count");
    }
}

//! The groups that an ext4 file system is divided into, and where in them no file may be.
//!
//! The superblock and the groups' descriptors are at the start of group 0, and once more in group 1 and in those whose number is a
//! power of 3, 5 or 7 (`sparse_super`): the kernel grows a file system while it is mounted only where these are. So blocks are
//! given out and counted as if they were not there, as **places**, and become the numbers of real blocks at the last moment.

use crate::space::BLOCK;

/// Blocks in a group, and inodes at most: what one block of a bitmap has bits for.
pub(crate) const PER_GROUP: u64 = 8 * BLOCK;
/// Blocks that are kept for the superblock and the groups' descriptors wherever these are: enough for 496 GiB.
pub(crate) const HEAD: u64 = 32;
/// The groups but the first that have them, as far as descriptors reach.
const BACKUPS: [u64; 17] = [1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343, 625, 729, 2187, 2401, 3125];

/// The groups of the first `groups` that have spare copies.
pub(crate) fn backups(groups: u64) -> impl Iterator<Item = u64> {
    BACKUPS.into_iter().take_while(move |group| *group < groups)
}

/// The places before which blocks are left out.
fn gaps() -> impl Iterator<Item = u64> {
    BACKUPS.into_iter().scan(0, |before, group| {
        let place = group * PER_GROUP - *before;
        *before += HEAD;
        Some(place)
    })
}

/// The block at a place.
pub(crate) fn block(place: u64) -> u64 {
    place + HEAD * gaps().take_while(|gap| *gap <= place).count() as u64
}

/// The blocks at `count` places from `place`, as runs: the first of each, and how many.
pub(crate) fn runs(place: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (place, place.saturating_add(count));
    std::iter::from_fn(move || {
        let stop = gaps().find(|gap| *gap > at).map_or(end, |gap| gap.min(end));
        (at < end).then(|| (block(at), stop - std::mem::replace(&mut at, stop)))
    })
}

/// The first place from `place` on where `count` blocks are in one run. There must be as many between two gaps.
pub(crate) fn whole(place: u64, count: u64) -> u64 {
    gaps().find(|gap| *gap > place && *gap < place + count).unwrap_or(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_copies_are_where_the_format_has_them() {
        // Documentation/filesystems/ext4/blockgroup.rst of the kernel.
        let mut powers = std::collections::BTreeSet::from([1]);
        for base in [3_u64, 5, 7] {
            powers.extend((1..9).map(|n| base.pow(n)));
        }
        let most = (HEAD - 1) * BLOCK / 32;
        let all: Vec<u64> = powers.into_iter().filter(|group| *group < most).collect();
        assert_eq!(all, BACKUPS);
        assert_eq!(backups(8).collect::<Vec<_>>(), [1, 3, 5, 7]);
        assert_eq!(backups(1).count(), 0);
    }

    #[test]
    fn places_are_all_blocks_but_those_of_the_copies() {
        let end = 30 * PER_GROUP;
        let mut expected = (HEAD..).filter(|b| b % PER_GROUP >= HEAD || !is_backup(b / PER_GROUP));
        for place in HEAD..end {
            assert_eq!(Some(block(place)), expected.next(), "{place}");
        }
        fn is_backup(group: u64) -> bool {
            BACKUPS.contains(&group)
        }
    }

    #[test]
    fn runs_end_before_the_copies() {
        assert_eq!(runs(HEAD, 5).collect::<Vec<_>>(), [(HEAD, 5)]);
        assert_eq!(runs(HEAD, 0).count(), 0);
        let (first, second) = (PER_GROUP, 3 * PER_GROUP);
        assert_eq!(
            runs(first - 2, 2 + 2 * PER_GROUP).collect::<Vec<_>>(),
            [(first - 2, 2), (first + HEAD, 2 * PER_GROUP - HEAD), (second + HEAD, HEAD)]
        );
        assert_eq!(runs(first, 1).collect::<Vec<_>>(), [(first + HEAD, 1)]);
        assert_eq!((whole(first - 2, 2), whole(first - 2, 3), whole(first, 9)), (first - 2, first, first));
    }
}

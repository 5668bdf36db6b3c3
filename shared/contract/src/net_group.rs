//! Groups: guests that reach each other because both joined.
//!
//! A group is a name that belongs to a user: VMs of another user in a group of the same name are no members of it. There is
//! nothing to make or delete; a group is there while a VM is in it.

use crate::{Code, Error, GroupName, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How many groups a VM can be in.
pub const MAX_GROUPS: usize = 16;

/// How many VMs can be in a group. What the host keeps of a group grows as the square of it.
pub const MAX_MEMBERS: usize = 64;

/// The groups that a VM is in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The user whose groups they are: the owner of the VM.
    pub owner: u32,
    /// Their names.
    pub names: BTreeSet<GroupName>,
}

impl Membership {
    /// Whether a VM of this membership and one of `other` reach each other.
    pub fn meets(&self, other: &Self) -> bool {
        self.owner == other.owner && !self.names.is_disjoint(&other.names)
    }
}

/// Whether a VM can be in all of these.
///
/// # Errors
/// [`Code::ResourceExhausted`] where they are more than [`MAX_GROUPS`].
pub fn check_groups(names: &BTreeSet<GroupName>) -> Result<(), Error> {
    if names.len() <= MAX_GROUPS {
        return Ok(());
    }
    Err(Error::new(Code::ResourceExhausted, format!("{} groups; a VM can be in {MAX_GROUPS}", names.len()))
        .hint("one group for all VMs that are to reach each other is enough"))
}

/// Puts a VM into these groups, and out of those that it was in before. At once: connections to VMs with which it shares
/// no group any more end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetGroups {
    /// The VM.
    pub vm: VmId,
    /// All its groups.
    pub groups: Membership,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(owner: u32, names: &[&str]) -> Membership {
        Membership { owner, names: names.iter().map(|n| n.parse().unwrap()).collect() }
    }

    #[test]
    fn a_group_is_its_owners() {
        assert!(of(1, &["a", "b"]).meets(&of(1, &["b", "c"])));
        assert!(!of(1, &["a"]).meets(&of(2, &["a"])), "another user's");
        assert!(!of(1, &["a"]).meets(&of(1, &["b"])));
        assert!(!of(1, &[]).meets(&of(1, &[])), "in none is not in one");
    }

    #[test]
    fn a_vm_is_in_so_many_groups() {
        let names = |n: usize| (0..n).map(|n| format!("g{n}").parse().unwrap()).collect();
        check_groups(&names(MAX_GROUPS)).unwrap();
        assert_eq!(check_groups(&names(MAX_GROUPS + 1)).unwrap_err().code, Code::ResourceExhausted);
    }
}

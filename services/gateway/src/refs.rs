//! How people name a VM: by id, by exact name, or by a unique prefix of either. An exact name wins over a prefix, so that
//! a VM called `web` can be named where `web-1` is too. A whole id wins over everything: it is what programs hold, and
//! nobody can turn it to another VM by choosing a name.

use bothy_contract::{Code, Error, VmId, vm::VmRecord};

/// The one VM of `vms` that `text` names.
///
/// `vms` must hold only what the caller may see: candidates are listed in the error.
///
/// # Errors
/// [`Code::NotFound`] when there is none; [`Code::InvalidArgument`] when there are several, naming them.
pub fn resolve<'a>(vms: &'a [VmRecord], text: &str) -> Result<&'a VmRecord, Error> {
    if text.is_empty() {
        return Err(Error::invalid("the name of a VM is empty").hint("`bothy vm list` shows the VMs"));
    }
    if let Some(vm) = whole_id(text).and_then(|id| vms.iter().find(|vm| vm.id == id)) {
        return Ok(vm);
    }
    if let Some(vm) = vms.iter().find(|vm| vm.name.as_str() == text) {
        return Ok(vm);
    }
    let id = text.to_ascii_lowercase().replace('-', "");
    let by_id = |vm: &VmRecord| {
        let have = vm.id.to_string();
        // A prefix that is no hex digits after the dashes are gone is a name's, not an id's.
        !id.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') && have.starts_with(&id)
    };
    let found: Vec<_> = vms.iter().filter(|vm| vm.name.as_str().starts_with(text) || by_id(vm)).collect();
    match found.as_slice() {
        [] => Err(Error::not_found(format!("there is no VM {text:?}")).hint("`bothy vm list` shows the VMs")),
        [one] => Ok(one),
        several => {
            let names: Vec<_> = several.iter().map(|vm| format!("{} ({})", vm.name, vm.id)).collect();
            Err(Error::new(
                Code::InvalidArgument,
                format!("{text:?} names {} VMs: {}", several.len(), names.join(", ")),
            )
            .hint("give the full name, or more of the id"))
        }
    }
}

/// The id that `text` is, where it is a whole one.
pub fn whole_id(text: &str) -> Option<VmId> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bothy_contract::{
        ImageName, VmId,
        vm::{Shape, VmState},
    };

    fn vm(name: &str, id: &str) -> VmRecord {
        let (id, name) = (id.parse::<VmId>().unwrap(), name.parse().unwrap());
        VmRecord {
            state: VmState::Running,
            ..VmRecord::new(id, name, 1000, ImageName::default_image(), Shape::default())
        }
    }

    const A: &str = "019a0000-0000-7000-8000-00000000000a";
    const B: &str = "019a0000-0000-7000-8000-00000000000b";
    const C: &str = "01ff0000-0000-7000-8000-00000000000c";

    #[test]
    fn ids_names_and_prefixes() {
        let vms = [vm("web", A), vm("web-1", B), vm("db", C)];
        let name = |text: &str| resolve(&vms, text).map(|vm| vm.name.as_str().to_owned());
        assert_eq!(name("web").unwrap(), "web", "an exact name wins over the prefix of another");
        assert_eq!(name("web-").unwrap(), "web-1");
        assert_eq!(name("d").unwrap(), "db");
        assert_eq!(name(A).unwrap(), "web");
        assert_eq!(name(&B.replace('-', "")).unwrap(), "web-1");
        assert_eq!(name(&C.to_uppercase()).unwrap(), "db");
        assert_eq!(name("01ff").unwrap(), "db");
    }

    #[test]
    fn what_names_none_or_several_is_refused_with_the_candidates() {
        let vms = [vm("web-1", A), vm("web-2", B), vm("db", C)];
        let err = resolve(&vms, "we").unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
        assert!(err.message.contains("web-1") && err.message.contains("web-2"), "{err}");
        assert!(!err.message.contains("db"), "{err}");
        assert_eq!(resolve(&vms, "019a").unwrap_err().code, Code::InvalidArgument);
        assert_eq!(resolve(&vms, "nope").unwrap_err().code, Code::NotFound);
        assert_eq!(resolve(&vms, "").unwrap_err().code, Code::InvalidArgument);
        assert_eq!(resolve(&vms, "-").unwrap_err().code, Code::NotFound);
        assert_eq!(resolve(&[], A).unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_name_that_looks_like_a_part_of_anothers_id_wins_but_a_whole_id_is_that_vm() {
        let vms = [vm("019a", C), vm(A, B), vm("web", A)];
        assert_eq!(resolve(&vms, "019a").unwrap().name.as_str(), "019a");
        assert_eq!(resolve(&vms, A).unwrap().name.as_str(), "web");
        assert_eq!(resolve(&vms, &A.replace('-', "")).unwrap().name.as_str(), "web");
        assert_eq!(resolve(&[vm(A, B)], A).unwrap().name.as_str(), A, "there is no VM of that id");
    }
}

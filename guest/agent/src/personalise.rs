//! `Personalise`: checked as a whole before anything changes, then done step by step. Every step may be done again,
//! before PID 1 is handed over and long after: a resumed guest gets its identity this way too.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use bothy_guest_proto::v1;

use crate::nic::{self, Nic};
use crate::{files, identity, kmsg, workdisk};

/// Refuses a request that could not be carried out in full.
///
/// # Errors
/// Says which part is wrong.
pub(crate) fn check(request: &v1::PersonaliseRequest) -> Result<Option<Nic>, String> {
    identity::check_hostname(&request.hostname)?;
    identity::check_machine_id(&request.machine_id)?;
    if !request.home.is_empty() {
        files::check_path(&request.home)?;
        if request.home == "/" {
            return Err("the home cannot be `/`".into());
        }
        if request.template {
            return Err("a template has no home: its work disk is a placeholder that nothing opens".into());
        }
    }
    files::check(&request.files)?;
    request.nic.as_ref().map(Nic::parse).transpose()
}

/// Makes the guest the machine that the host says it is. Returns its address.
///
/// # Errors
/// The first step that failed; doing it all again is safe.
pub(crate) async fn apply(request: v1::PersonaliseRequest, nic: Option<Nic>) -> io::Result<Option<Ipv4Addr>> {
    // Randomness and time first: what follows may want both.
    identity::add_entropy(&request.entropy).map_err(|e| named("add entropy", &e))?;
    if request.unix_time_us != 0 {
        identity::set_clock(request.unix_time_us).map_err(|e| named("set the clock", &e))?;
    }
    nic::loopback().await?;
    if let Some(nic) = &nic {
        nic::apply(nic).await?;
    }
    let address = nic.as_ref().map(|nic| nic.address);
    // Disk work blocks, and Health must go on answering.
    tokio::task::spawn_blocking(move || on_disk(&request, nic.as_ref()))
        .await
        .map_err(io::Error::other)??;
    Ok(address)
}

fn on_disk(request: &v1::PersonaliseRequest, nic: Option<&Nic>) -> io::Result<()> {
    let root = Path::new("/");
    identity::set_hostname(root, &request.hostname).map_err(|e| named("set the host name", &e))?;
    identity::set_machine_id(root, &request.machine_id).map_err(|e| named("set the machine id", &e))?;
    if let Some(nic) = nic {
        identity::set_resolver(root, &nic.dns).map_err(|e| named("configure the resolver", &e))?;
    }
    // Before the files: some of them are for the home.
    if !request.home.is_empty() && !workdisk::mount_on(Path::new(&request.home))? {
        kmsg::info("no work disk: the home is on the root file system");
    }
    files::write_all(root, &request.files).map_err(|e| named("write the files", &e))
}

fn named(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_part_refuses_the_whole() {
        let good = v1::PersonaliseRequest {
            hostname: "dev".into(),
            machine_id: "0".repeat(32),
            home: "/root".into(),
            ..Default::default()
        };
        assert!(check(&good).is_ok());
        let broken: [fn(&mut v1::PersonaliseRequest); 6] = [
            |request| request.template = true,
            |request| request.hostname = "a b".into(),
            |request| request.machine_id.clear(),
            |request| request.home = "/".into(),
            |request| request.home = "/root/..".into(),
            |request| request.files = vec![v1::File { path: "x".into(), ..Default::default() }],
        ];
        for change in broken {
            let mut request = good.clone();
            change(&mut request);
            assert!(check(&request).is_err(), "{request:?}");
        }
    }
}

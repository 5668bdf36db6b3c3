//! `Personalise`: checked as a whole before anything changes, then done step by step. Every step may be done again,
//! before PID 1 is handed over and long after: a resumed guest gets its identity this way too.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use bothy_guest_proto::v1;

use crate::files::Put;
use crate::nic::{self, Known, Nic};
use crate::timeline::Steps;
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

/// What a template found out while there was time, for the machine that it will become.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    pub(crate) link: Option<Known>,
    pub(crate) seeds: Vec<PathBuf>,
}

/// Makes the guest the machine that the host says it is. Returns its address. With `resumed`, it was another one, a template:
/// what that one's processes and kernel know of themselves is another's now, too, and as none of them runs, files are
/// written in place.
///
/// What does not depend on one another is done side by side; a work disk that is mounted is grown by whoever calls.
///
/// # Errors
/// The first step that failed; doing it all again is safe.
pub(crate) async fn apply(
    request: &v1::PersonaliseRequest,
    nic: Option<Nic>,
    resumed: Option<&Prepared>,
    steps: &Steps,
) -> io::Result<Option<Ipv4Addr>> {
    // Randomness and time first: what follows may want both.
    steps.run("entropy", || identity::add_entropy(&request.entropy)).map_err(|e| named("add entropy", &e))?;
    if request.unix_time_us != 0 {
        steps
            .run("clock", || identity::set_clock(request.unix_time_us))
            .map_err(|e| named("set the clock", &e))?;
    }
    let put = if resumed.is_some() { files::overwrite } else { files::write };
    // Mounting waits for the disk, and what follows need not; Health must go on answering, too.
    let home = tokio::task::spawn_blocking({
        let (steps, asked) = (steps.clone(), request.clone());
        move || steps.run("home", || make_home(&asked, put))
    });
    steps.wait("network", network(nic.as_ref(), resumed)).await?;
    steps.run("name", || make_name(request, nic.as_ref(), put, resumed))?;
    home.await.map_err(io::Error::other)??;
    Ok(nic.map(|nic| nic.address))
}

async fn network(nic: Option<&Nic>, resumed: Option<&Prepared>) -> io::Result<()> {
    if let (Some(nic), Some(known)) = (nic, resumed.and_then(|resumed| resumed.link.as_ref())) {
        match known.turn_into(nic) {
            Ok(()) => return Ok(()),
            // A user's image may do with its link what it likes.
            Err(error) => kmsg::info(&format!("the link is not as the template left it: {error}")),
        }
    }
    nic::loopback().await?;
    match nic {
        Some(nic) => nic::apply(nic).await,
        None => Ok(()),
    }
}

fn make_name(
    request: &v1::PersonaliseRequest,
    nic: Option<&Nic>,
    put: Put,
    resumed: Option<&Prepared>,
) -> io::Result<()> {
    let root = Path::new("/");
    identity::set_hostname(root, &request.hostname, put).map_err(|e| named("set the host name", &e))?;
    identity::set_machine_id(root, &request.machine_id, put).map_err(|e| named("set the machine id", &e))?;
    if let Some(nic) = nic {
        identity::set_resolver(root, &nic.dns, put).map_err(|e| named("configure the resolver", &e))?;
    }
    if let Some(resumed) = resumed {
        identity::new_boot_id().map_err(|e| named("set the boot id", &e))?;
        identity::renew_seeds(&resumed.seeds).map_err(|e| named("renew the random seed", &e))?;
    }
    Ok(())
}

fn make_home(request: &v1::PersonaliseRequest, put: Put) -> io::Result<()> {
    // Before the files: some of them are for the home.
    let home = Path::new(&request.home);
    if !request.home.is_empty() && !workdisk::mount_on(home, request.work_bytes)? {
        kmsg::info("no work disk: the home is on the root file system");
    }
    files::put_all(Path::new("/"), &request.files, put).map_err(|e| named("write the files", &e))
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

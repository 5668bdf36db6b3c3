//! `Personalise`: checked as a whole before anything changes, then done step by step. Every step may be done again,
//! before PID 1 is handed over and long after: a resumed guest gets its identity this way too.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use bothy_guest_proto::v1;

use crate::nic::{self, Nic};
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

/// Makes the guest the machine that the host says it is. Returns its address. With `resumed`, it was another one, a template:
/// what that one's processes and kernel know of themselves is another's now, too.
///
/// What does not depend on one another is done side by side; a work disk that is mounted is grown by whoever calls.
///
/// # Errors
/// The first step that failed; doing it all again is safe.
pub(crate) async fn apply(
    request: v1::PersonaliseRequest,
    nic: Option<Nic>,
    resumed: bool,
    steps: &Steps,
) -> io::Result<Option<Ipv4Addr>> {
    // Randomness and time first: what follows may want both.
    steps.run("entropy", || identity::add_entropy(&request.entropy)).map_err(|e| named("add entropy", &e))?;
    if request.unix_time_us != 0 {
        steps
            .run("clock", || identity::set_clock(request.unix_time_us))
            .map_err(|e| named("set the clock", &e))?;
    }
    let network = steps.wait("network", async {
        if !resumed {
            nic::loopback().await?;
        }
        match &nic {
            Some(nic) => nic::apply(nic).await,
            None => Ok(()),
        }
    });
    // Disk work blocks, and Health must go on answering.
    let (asked, dns) = (request.clone(), nic.as_ref().map(|nic| nic.dns.clone()));
    let name = blocking(steps, "name", move || {
        let root = Path::new("/");
        identity::set_hostname(root, &asked.hostname).map_err(|e| named("set the host name", &e))?;
        identity::set_machine_id(root, &asked.machine_id).map_err(|e| named("set the machine id", &e))?;
        if let Some(dns) = dns {
            identity::set_resolver(root, &dns).map_err(|e| named("configure the resolver", &e))?;
        }
        if resumed {
            identity::new_boot_id().map_err(|e| named("set the boot id", &e))?;
            identity::renew_seeds(root).map_err(|e| named("renew the random seed", &e))?;
        }
        Ok(())
    });
    let home = blocking(steps, "home", move || {
        // Before the files: some of them are for the home.
        let home = Path::new(&request.home);
        if !request.home.is_empty() && !workdisk::mount_on(home, request.work_bytes)? {
            kmsg::info("no work disk: the home is on the root file system");
        }
        files::write_all(Path::new("/"), &request.files).map_err(|e| named("write the files", &e))
    });
    tokio::try_join!(network, name, home)?;
    Ok(nic.map(|nic| nic.address))
}

async fn blocking(
    steps: &Steps,
    name: &'static str,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let steps = steps.clone();
    let work = tokio::task::spawn_blocking(move || steps.run(name, work));
    work.await.map_err(io::Error::other)?
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

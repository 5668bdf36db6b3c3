//! Who a guest is: told to one that boots once it answers, and to one that was resumed with the first words that it hears.

use super::{
    Guest, MAX_STEPS,
    clock::{adjust, behind, unix_time_us},
    fail, plain_id, step,
};
use crate::lifecycle::files::HostKey;
use bothy_contract::{
    Error,
    guest::BootStep,
    image::{BootSet, InitStyle},
    net::Lease,
    workspace::GuestFile,
};
use bothy_guest_proto::{
    GuestClient,
    v1::{Defaults, File, Nic, PersonaliseReply, PersonaliseRequest},
};
use serde::{Deserialize, Serialize};

/// Random bytes for the guest's pool.
const ENTROPY: usize = 64;

/// Who a guest is to be.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Its host name.
    pub(crate) hostname: String,
    /// 32 hex digits.
    pub(crate) machine_id: String,
    /// Its ssh host key.
    pub(crate) key: HostKey,
    /// Files of its user's, for one that was resumed.
    pub(crate) files: Vec<GuestFile>,
    /// The size of its work disk.
    pub(crate) work_mib: u64,
    /// Whether it is nobody yet: then it has no home, and looks at no work disk.
    pub(crate) template: bool,
}

/// What a guest tells that was resumed and has its identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resumed {
    /// Whether its home has the files of its user's identity.
    pub(crate) identity: bool,
    /// How it came to be itself, in place of a boot.
    pub(crate) steps: Vec<BootStep>,
    /// What is left to do.
    pub(crate) left: Left,
}

/// What a guest has still to do, where somebody may want to wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Left {
    /// Its work disk is larger than the file system on it.
    pub(crate) grow: bool,
    /// Services are restarted that must know who they are.
    pub(crate) services: bool,
}

impl Guest {
    /// Gives a guest that boots its identity once it answers.
    pub(crate) async fn personalise(
        &self,
        identity: &Identity,
        lease: &Lease,
        boot: &BootSet,
    ) -> Result<(), Error> {
        let (mut client, _) = self.first_client().await;
        tell(&mut client, identity, lease, boot).await.map(drop)
    }

    /// Gives a guest that was resumed its identity and the time. Its boot id, and what it still does. An emulated one runs
    /// every word for the first time, so few are made.
    pub(crate) async fn personalise_resumed(
        &self,
        identity: &Identity,
        lease: &Lease,
        boot: &BootSet,
    ) -> Result<(String, Resumed), Error> {
        self.until_heard(|mut client| async move {
            // To tell it again is to tell it once.
            let told = tell(&mut client, identity, lease, boot).await?;
            // It was told the time with its identity, which took its time to be heard.
            if let Err(error) = adjust(&mut client, behind(told.unix_time_us)).await {
                tracing::warn!(%error, "the guest's clock may be wrong");
            }
            let left = |name: &str| told.pending.iter().any(|left| left == name);
            let left = Left { grow: left("grow"), services: left("services") };
            let steps = told.steps.into_iter().take(MAX_STEPS).map(step).collect();
            let resumed = Resumed { identity: !identity.files.is_empty(), steps, left };
            Ok((plain_id(&told.boot_id), resumed))
        })
        .await
    }
}

async fn tell(
    client: &mut GuestClient,
    identity: &Identity,
    lease: &Lease,
    boot: &BootSet,
) -> Result<PersonaliseReply, Error> {
    let file = |path: &str, content, mode| File { path: path.to_owned(), content, mode };
    let mut files = vec![
        file("/etc/ssh/ssh_host_ed25519_key", identity.key.private.clone(), 0o600),
        file("/etc/ssh/ssh_host_ed25519_key.pub", identity.key.public.clone(), 0o644),
    ];
    files.extend(identity.files.iter().map(|f| file(&f.path, f.content.clone().into_bytes(), f.mode)));
    let request = PersonaliseRequest {
        hostname: identity.hostname.clone(),
        machine_id: identity.machine_id.clone(),
        nic: Some(Nic {
            mac: lease.mac.clone(),
            address: lease.address.to_string(),
            prefix: lease.prefix.into(),
            gateway: lease.gateway.to_string(),
            dns: lease.dns.iter().map(ToString::to_string).collect(),
            address6: lease.address6.map(|a| a.to_string()).unwrap_or_default(),
            prefix6: lease.prefix6.unwrap_or_default().into(),
            gateway6: lease.gateway6.map(|a| a.to_string()).unwrap_or_default(),
        }),
        unix_time_us: unix_time_us(),
        entropy: entropy()?,
        files,
        home: if identity.template { String::new() } else { boot.home.clone() },
        init_systemd: boot.init == InitStyle::Systemd,
        template: identity.template,
        work_bytes: if identity.template { 0 } else { identity.work_mib << 20 },
        restart_units: Vec::new(),
        defaults: Some(Defaults {
            user: boot.defaults.user.clone().unwrap_or_default(),
            env: boot.defaults.env.clone(),
            workdir: boot.defaults.working_dir.clone().unwrap_or_default(),
        })
        .filter(|defaults| *defaults != Defaults::default()),
    };
    Ok(client.personalise(request).await.map_err(|s| fail("personalise", &s))?.into_inner())
}

/// Random bytes for a guest's pool.
pub(super) fn entropy() -> Result<Vec<u8>, Error> {
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|e| Error::internal("no random bytes", &e))?;
    Ok(entropy)
}

//! The network of the VMs: leases over a pool of warm slots. What the bus methods do is here; how it is done is in the
//! modules below.
//!
//! **What is true when.** The lease table says who holds a slot, the kernel which devices there are, and memory only
//! repeats the two. A lease's row is written before its VM hears of it and struck out after its device is gone; so after
//! a crash at any point each row has a device or gets one ([`Network::start`]), and each device without a row is warm, if
//! nobody has it open, or is removed.
//!
//! **Locks**, in the order they are taken: `gate` (shared by all changes, exclusive for repairs and teardown), one per VM,
//! then `grouping`, then, inside, the
//! firewall's. `slots` and `vms` are held for a few instructions only, never across an await.

mod chosen;
pub mod egress;
pub mod groups;
pub mod upkeep;

use crate::leases::Held;
use crate::{
    devices::Devices, dns::zone::Zone, firewall::Firewall, forwarding, forwarding6, leases::Leases,
    link::Links, plan::Plan, publish::Publisher, slots::Slots,
};
use bothy_config::Config;
use bothy_contract::{
    Code, Error, Service, VmId, VmName,
    net::{AcquireLease, Egress, Lease, LeaseList, LeaseRow, NetHost, Publish},
    net_group::Membership,
};
use egress::Denials;
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Mutex as AsyncMutex, Notify, RwLock, mpsc};

/// How often the kernel is compared with what should be there. Somebody who deletes the bridge is repaired within it.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// Locks that VMs are spread over, so that two requests for one VM come one after the other.
const VM_LOCKS: usize = 64;

/// The network. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    plan: Arc<Plan>,
    devices: Devices,
    leases: Leases,
    slots: Mutex<Slots>,
    vms: Mutex<BTreeMap<VmId, Held>>,
    vm_locks: Vec<AsyncMutex<()>>,
    /// Whether the network is up; false for good after a teardown.
    gate: RwLock<bool>,
    /// Held by whoever fills the pool: one refill at a time.
    refilling: AsyncMutex<()>,
    /// Held by whoever changes who is in which group.
    grouping: AsyncMutex<()>,
    wanted: Notify,
    publisher: Publisher,
    /// The VMs' names, for the name server.
    zone: Arc<Zone>,
    denials: Mutex<Denials>,
    /// Whether forwarding has been seen to; the regular check looks at it again, as uplinks come and go.
    forwarding: AtomicBool,
}

impl Network {
    /// Brings the network up, adopting what an earlier agent left: bridge, TAPs, leases. Returns with the pool warm.
    ///
    /// # Errors
    /// `invalid_argument` for a configuration that cannot work; `failed_precondition` where the subnet belongs to
    /// somebody on this host, where leases were made for another one, or where libnftables is missing.
    pub async fn start(config: &Config) -> Result<Self, Error> {
        let links = Links::open()?;
        let leases = open_leases(config)?;
        let plan = Arc::new(chosen::plan(config, &leases, &links).await?);
        let firewall = Arc::new(Firewall::open(Arc::clone(&plan))?);
        let vms = leases.load(&plan).await?;

        let devices = Devices { plan: Arc::clone(&plan), links, firewall };
        let held: BTreeSet<u32> = vms.values().map(|h| h.slot).collect();
        // The rules stand before the first device does. Those of leases at once, so that a new agent under running VMs
        // interrupts nothing: both tables are replaced in one transaction.
        let policies = vms.values().map(|h| (h.slot, h.egress.clone())).collect();
        let uplinks = leases.forwarding().await?.into_iter().collect();
        let uplinks = (uplinks, forwarding6::uplinks_of(&leases).await?);
        let guard6 = forwarding6::is_guarded(&leases).await?;
        let (granted, peers) = (leases.granted().await?, groups::pairs(&vms));
        devices.firewall.start(&policies, &granted, peers, uplinks, guard6).await?;
        forwarding::refresh(&leases, &devices.firewall).await?;
        let bridge = devices.bridge().await?;
        let warm = upkeep::adopt(&devices, &held, bridge).await?;

        let zone = Zone::new(Arc::clone(&plan), &config.host);
        vms.values().for_each(|held| zone.set(held.slot, held.name.as_ref()));
        let inner = Inner {
            slots: Mutex::new(Slots::new(plan.capacity(), held, warm)),
            vms: Mutex::new(vms),
            vm_locks: std::iter::repeat_with(AsyncMutex::default).take(VM_LOCKS).collect(),
            gate: RwLock::new(true),
            refilling: AsyncMutex::default(),
            grouping: AsyncMutex::default(),
            wanted: Notify::new(),
            publisher: Publisher::default(),
            zone: Arc::new(zone),
            denials: Mutex::default(),
            forwarding: AtomicBool::new(false),
            plan,
            devices,
            leases,
        };
        let network = Self(Arc::new(inner));
        network.0.keep_forwarding().await?;
        network.0.restore_ports();
        network.refill().await;
        Ok(network)
    }

    /// Fills the pool whenever it is short, and compares the kernel with what should be there every few seconds. Runs
    /// until it is dropped; what it has begun by then is completed by the next start.
    pub async fn keep(&self) {
        let mut tick = tokio::time::interval(CHECK_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.0.wanted.notified() => self.0.quiet().await,
                _ = tick.tick() => if let Err(error) = self.check().await {
                    tracing::error!(%error, "cannot check the network");
                },
            }
            self.refill().await;
        }
    }

    /// A slot for a VM; the same one again if it has one. Policy and ports are as asked for either way.
    ///
    /// # Errors
    /// `resource_exhausted` where every address is taken; `already_exists` where a port is.
    pub async fn acquire(&self, request: AcquireLease) -> Result<Lease, Error> {
        self.whole(move |net| async move { net.0.acquire(request).await }).await
    }

    /// Takes `vm`'s slot back. A VM that has none is fine.
    pub async fn release(&self, vm: VmId) -> Result<(), Error> {
        self.whole(move |net| async move { net.0.release(vm).await }).await
    }

    /// What `vm` may reach, from now on.
    pub async fn set_egress(&self, vm: VmId, egress: Egress) -> Result<(), Error> {
        let egress = egress.checked()?;
        self.whole(move |net| async move { net.0.set_egress(vm, egress).await }).await
    }

    /// Publishes `ports` of `vm` in place of those before.
    pub async fn publish(&self, vm: VmId, ports: Vec<Publish>) -> Result<(), Error> {
        self.whole(move |net| async move { net.0.set_publish(vm, ports).await }).await
    }

    /// The name that `vm` is known by; none for none.
    pub async fn set_name(&self, vm: VmId, name: Option<VmName>) -> Result<(), Error> {
        self.whole(move |net| async move { net.0.set_name(vm, name).await }).await
    }

    /// The guests that somebody waits for at a published port, each time one does not accept at once: it may be at rest. For
    /// whoever asks first.
    pub fn unreached(&self) -> Option<mpsc::Receiver<IpAddr>> {
        self.0.publisher.unreached()
    }

    /// The VM whose guest has that address.
    pub fn vm_at(&self, guest: IpAddr) -> Option<VmId> {
        let slot = self.0.plan.slot_of(guest)?;
        self.locked_vms().iter().find(|(_, held)| held.slot == slot).map(|(vm, _)| *vm)
    }

    /// All leases, by slot.
    pub fn list(&self) -> LeaseList {
        let vms = self.locked_vms().clone();
        let row = |(vm, held): (VmId, Held)| {
            let lease = self.0.lease(&held).ok()?;
            let Held { slot: _, egress, publish, groups, name } = held;
            Some(LeaseRow { vm, lease, nat: egress == Egress::Open, egress, publish, groups, name })
        };
        let mut leases: Vec<LeaseRow> = vms.into_iter().filter_map(row).collect();
        leases.sort_by_key(|row| row.lease.slot);
        LeaseList { leases }
    }

    /// How the network stands.
    pub fn show(&self) -> NetHost {
        let (plan, slots) = (&self.0.plan, self.0.slots());
        NetHost {
            bridge: plan.bridge.clone(),
            subnet: plan.cidr(),
            warm: slots.warm(),
            leased: slots.held(),
            capacity: plan.capacity(),
            subnet6: plan.cidr6(),
            dns: None,
        }
    }

    /// Removes everything of ours from the kernel and puts the settings back. The leases stay. Nothing else can be done
    /// afterwards; a new start makes all devices again.
    ///
    /// # Errors
    /// `failed_precondition`, with nothing changed, while a process has the TAP of a lease open.
    pub async fn teardown(&self) -> Result<(), Error> {
        self.whole(|net| async move { net.0.teardown().await }).await
    }

    /// Compares the kernel with what should be there, and mends it.
    pub async fn check(&self) -> Result<(), Error> {
        self.whole(|net| async move { net.0.check().await }).await
    }

    async fn refill(&self) {
        let done = self.whole(|net| async move { net.0.refill().await }).await;
        if let Err(error) = done {
            tracing::error!(%error, "cannot fill the pool");
        }
    }

    /// Runs `f` to its end also where the caller goes away half-way (a deadline, a disconnect).
    async fn whole<T, F>(&self, f: impl FnOnce(Self) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        use tracing::Instrument;
        let task = tokio::spawn(f(self.clone()).in_current_span());
        task.await.map_err(|e| Error::internal("the request's task failed", &e))?
    }

    /// What follows from the configuration.
    pub fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.0.plan)
    }

    /// The VMs' names as they are now.
    pub fn zone(&self) -> Arc<Zone> {
        Arc::clone(&self.0.zone)
    }

    /// The bridge's index, as long as there is one.
    pub async fn bridge_index(&self) -> Option<u32> {
        let found = self.0.devices.links.find(&self.0.plan.bridge).await;
        found.ok().flatten().map(|link| link.index)
    }

    fn locked_vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Held>> {
        self.0.vms()
    }
}

impl Inner {
    async fn acquire(&self, request: AcquireLease) -> Result<Lease, Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let vm = request.vm;
        let _one = self.vm_lock(vm).lock().await;
        let known = self.vms().get(&vm).cloned();
        let egress = egress::wanted(&request, known.as_ref().map(|held| &held.egress))?;
        if let Some(mut held) = known {
            if let Some(ports) = request.publish {
                self.apply_publish(vm, &held, &ports).await?;
            }
            if let Some(groups) = request.groups {
                self.apply_groups(vm, &held, &groups).await?;
            }
            self.apply_egress(vm, &held, &egress).await?;
            held.egress = egress;
            return self.lease(&held);
        }
        let number = match self.take_warm() {
            Some(number) => number,
            None => self.make_for_vm().await?,
        };
        self.wanted.notify_one();
        let mut held = Held::new(number);
        let given = async {
            let slot = self
                .plan
                .slot(number)
                .ok_or_else(|| Error::new(Code::Internal, "a slot beyond the subnet"))?;
            self.leases.insert(vm, &slot).await?;
            self.vms().insert(vm, held.clone());
            if let Some(ports) = request.publish {
                self.apply_publish(vm, &held, &ports).await?;
            }
            if let Some(groups) = request.groups {
                self.apply_groups(vm, &held, &groups).await?;
            }
            // A free slot reaches nothing.
            if egress == held.egress {
                return Ok(());
            }
            self.apply_egress(vm, &held, &egress).await
        };
        if let Err(e) = given.await {
            self.publisher.clear(number);
            let undone = async {
                self.devices.firewall.set_egress(number, &Egress::None).await?;
                if let Ok(now) = self.held(vm) {
                    self.apply_groups(vm, &now, &Membership::default()).await?;
                }
                self.leases.delete(vm).await
            };
            if let Err(undo) = undone.await {
                // The row may be there: the slot stays the VM's, so that nobody else gets it, until it is released.
                return Err(Error { message: format!("{}; and then: {}", e.message, undo.message), ..e });
            }
            self.vms().remove(&vm);
            self.slots().put_back(number);
            return Err(e.context(format!("no lease for VM {vm}")));
        }
        held.egress = egress;
        self.lease(&held)
    }

    fn take_warm(&self) -> Option<u32> {
        self.slots().take()
    }

    async fn make_for_vm(&self) -> Result<u32, Error> {
        let reserved = self.slots().reserve();
        let Some(number) = reserved else {
            // The last ones may be in the making this moment, for the pool.
            let _filled = self.refilling.lock().await;
            return self.take_warm().ok_or_else(|| self.full());
        };
        for (number, made) in self.devices.make(&[number]).await {
            if let Err(e) = made {
                self.slots().unmake(number);
                return Err(e);
            }
            self.slots().made_and_taken(number);
        }
        Ok(number)
    }

    fn full(&self) -> Error {
        let message =
            format!("all {} addresses of subnet {} are taken", self.plan.capacity(), self.plan.cidr());
        Error::new(Code::ResourceExhausted, message)
            .hint("delete VMs with `bothy vm delete`, or set a larger net.prefix")
    }

    async fn release(&self, vm: VmId) -> Result<(), Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let _one = self.vm_lock(vm).lock().await;
        let known = self.vms().get(&vm).cloned();
        let Some(held) = known else { return Ok(()) };
        self.publisher.clear(held.slot);
        self.zone.set(held.slot, None);
        self.apply_groups(vm, &held, &Membership::default()).await?;
        self.apply_egress(vm, &held, &Egress::None).await?;
        // The kernel takes its time over either, and neither needs the other.
        let counts = self.devices.firewall.forget_counts(held.slot);
        tokio::try_join!(self.devices.remove(held.slot), counts)?;
        self.leases.delete(vm).await?;
        self.vms().remove(&vm);
        self.denials().forget(held.slot);
        self.slots().unmake(held.slot);
        self.wanted.notify_one();
        Ok(())
    }

    async fn set_publish(&self, vm: VmId, ports: Vec<Publish>) -> Result<(), Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let _one = self.vm_lock(vm).lock().await;
        let held = self.held(vm)?;
        self.apply_publish(vm, &held, &ports).await
    }

    async fn set_name(&self, vm: VmId, name: Option<VmName>) -> Result<(), Error> {
        let up = self.gate.read().await;
        ensure_up(*up)?;
        let _one = self.vm_lock(vm).lock().await;
        let held = match (self.held(vm), &name) {
            (Ok(held), _) => held,
            (Err(_), None) => return Ok(()),
            (Err(e), Some(_)) => return Err(e),
        };
        self.leases.set_name(vm, name.clone()).await?;
        self.zone.set(held.slot, name.as_ref());
        self.vms().insert(vm, Held { name, ..held });
        Ok(())
    }

    /// Opens the sockets, then writes them down: a crash between the two leaves what was published before.
    async fn apply_publish(&self, vm: VmId, held: &Held, ports: &[Publish]) -> Result<(), Error> {
        let guest = self.lease(held)?.address.into();
        self.publisher.set(held.slot, guest, ports)?;
        if held.publish == ports {
            return Ok(());
        }
        if let Err(e) = self.leases.set_publish(vm, ports).await {
            self.publisher.restore(held.slot, guest, &held.publish);
            return Err(e);
        }
        let now = self.held(vm)?;
        self.vms().insert(vm, Held { publish: ports.to_vec(), ..now });
        Ok(())
    }

    /// Listens again for what is published and is not listened for, which is so at start only, or where others held a
    /// port then.
    fn restore_ports(&self) {
        let vms = self.vms().clone();
        for (vm, held) in vms.iter().filter(|(_, held)| !held.publish.is_empty()) {
            let Ok(lease) = self.lease(held) else { continue };
            for error in self.publisher.restore(held.slot, lease.address.into(), &held.publish) {
                tracing::warn!(%vm, %error, "a published port is not there");
            }
        }
    }

    fn held(&self, vm: VmId) -> Result<Held, Error> {
        let known = self.vms().get(&vm).cloned();
        known.ok_or_else(|| Error::not_found(format!("VM {vm} has no lease")))
    }

    fn anybody_goes_out(&self) -> bool {
        self.vms().values().any(|held| held.egress != Egress::None)
    }

    async fn enable_forwarding(&self) -> Result<(), Error> {
        let (links, firewall) = (&self.devices.links, &self.devices.firewall);
        firewall.set_inside(&links.inside(&self.plan.bridge).await?).await?;
        forwarding::enable(&self.plan, links, &self.leases, firewall).await?;
        forwarding6::enable(&self.plan, links, &self.leases, firewall).await?;
        self.forwarding.store(true, Ordering::Release);
        Ok(())
    }

    fn lease(&self, held: &Held) -> Result<Lease, Error> {
        let none = || Error::new(Code::Internal, format!("slot {} is beyond the subnet", held.slot));
        let slot = self.plan.slot(held.slot).ok_or_else(none)?;
        Ok(self.plan.lease(&slot, vec![self.plan.gateway()]))
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "the index is taken modulo the length, which is a constant above 0"
    )]
    fn vm_lock(&self, vm: VmId) -> &AsyncMutex<()> {
        let mut hasher = DefaultHasher::new();
        vm.hash(&mut hasher);
        &self.vm_locks[hasher.finish() as usize % VM_LOCKS]
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn denials(&self) -> MutexGuard<'_, Denials> {
        self.denials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, Held>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_leases(config: &Config) -> Result<Leases, Error> {
    let dir = config.service_dir(Service::Net);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|e| Error::internal(format!("cannot make the directory {}", dir.display()), &e))?;
    Leases::open(&dir.join("net.db"))
}

fn ensure_up(up: bool) -> Result<(), Error> {
    if up {
        return Ok(());
    }
    Err(Error::new(Code::FailedPrecondition, "the network has been torn down")
        .hint("start the net-agent again, with `bothy host up`"))
}

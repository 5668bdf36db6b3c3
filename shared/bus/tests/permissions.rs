//! What the real nats-server refuses, verb by verb, to each service under its own identity.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which are to stop with the line")]

use async_nats::{Event, ServerError};
use bothy_bus::testing::TestBus;
use bothy_contract::{Service, methods, subject};
use futures::StreamExt;
use std::{collections::BTreeSet, time::Duration};
use tokio::{sync::mpsc, time::timeout};

/// A plain connection under a service's identity: what a compromised service would use.
struct Raw {
    nats: async_nats::Client,
    errors: mpsc::UnboundedReceiver<String>,
    inbox: String,
}

impl Raw {
    async fn connect(bus: &TestBus, service: Service) -> Self {
        let seed = fs_err::read_to_string(bus.config.bus_seed(service)).unwrap();
        let (sender, errors) = mpsc::unbounded_channel();
        let inbox = subject::inbox_prefix(&bus.config.host, service);
        let nats = async_nats::ConnectOptions::with_nkey(seed)
            .custom_inbox_prefix(&inbox)
            .event_callback(move |event| {
                if let Event::ServerError(ServerError::Other(text)) = event {
                    let _ = sender.send(text);
                }
                std::future::ready(())
            })
            .connect(bus.config.bus_url())
            .await
            .unwrap();
        Self { nats, errors, inbox }
    }

    /// Everything that the server has refused up to now. It works through a connection's commands in order, so after
    /// the answer to a last, forbidden publish there is nothing more to come.
    async fn refused(&mut self) -> BTreeSet<String> {
        let end = "the.end";
        self.nats.publish(end, "".into()).await.unwrap();
        self.nats.flush().await.unwrap();
        let mut out = BTreeSet::new();
        loop {
            let text = timeout(Duration::from_secs(10), self.errors.recv()).await.unwrap().unwrap();
            let subject = text.split('"').nth(1).unwrap().to_owned();
            if subject == end {
                return out;
            }
            out.insert(subject);
        }
    }
}

/// The subjects of all methods.
fn subjects(bus: &TestBus) -> Vec<(String, methods::MethodInfo)> {
    let host = &bus.config.host;
    methods::table().into_iter().map(|m| (subject::of(host, m.service, m.noun, m.verb), m)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_is_refused_unless_the_table_names_the_caller() {
    let bus = TestBus::start();
    for service in Service::ALL {
        let mut raw = Raw::connect(&bus, service).await;
        let mut expected = BTreeSet::new();
        // A few at a time: the client keeps at most so many errors for its callback.
        for chunk in subjects(&bus).chunks(16) {
            for (to, method) in chunk {
                raw.nats.publish(to.clone(), "{}".into()).await.unwrap();
                if !method.callers.contains(&service) {
                    expected.insert(to.clone());
                }
            }
            assert_eq!(raw.refused().await, expected, "{service:?}");
            expected.clear();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_is_refused_unless_the_service_serves_it() {
    let bus = TestBus::start();
    for service in Service::ALL {
        let mut raw = Raw::connect(&bus, service).await;
        for chunk in subjects(&bus).chunks(16) {
            let mut expected = BTreeSet::new();
            let mut kept = Vec::new();
            for (n, (to, method)) in chunk.iter().enumerate() {
                // As a member of a queue group or not makes no difference.
                kept.push(if n % 2 == 0 {
                    raw.nats.subscribe(to.clone()).await.unwrap()
                } else {
                    raw.nats.queue_subscribe(to.clone(), "q".into()).await.unwrap()
                });
                if method.service != service {
                    expected.insert(to.clone());
                }
            }
            assert_eq!(raw.refused().await, expected, "{service:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reads_anothers_inbox_or_everything_or_the_system() {
    let bus = TestBus::start();
    let host = &bus.config.host;
    for service in Service::ALL {
        let mut raw = Raw::connect(&bus, service).await;
        let mut forbidden: BTreeSet<String> = Service::ALL
            .iter()
            .filter(|other| **other != service)
            .map(|other| format!("{}.>", subject::inbox_prefix(host, *other)))
            .collect();
        for wide in [">", "*.>", "_INBOX.>", "bothy.>", "$SYS.>", "$JS.>", "bothy.local.event.>"] {
            forbidden.insert(wide.to_owned());
        }
        let mut kept = Vec::new();
        for subject in &forbidden {
            kept.push(raw.nats.subscribe(subject.clone()).await.unwrap());
        }
        kept.push(raw.nats.subscribe(format!("{}.>", raw.inbox)).await.unwrap());
        assert_eq!(raw.refused().await, forbidden, "{service:?}");

        let mut forbidden: BTreeSet<String> =
            Service::ALL.iter().map(|other| format!("{}.x", subject::inbox_prefix(host, *other))).collect();
        for to in [
            "$SYS.REQ.SERVER.PING",
            "$SYS.REQ.USER.INFO",
            "$JS.API.INFO",
            "$JS.API.STREAM.DELETE.BOTHY_OPS",
            "$JS.API.STREAM.PURGE.BOTHY_OPS",
            "$JS.API.STREAM.MSG.GET.BOTHY_OPS",
            "$JS.API.STREAM.CREATE.OTHER",
            "$JS.API.CONSUMER.CREATE.OTHER",
        ] {
            forbidden.insert(to.to_owned());
        }
        for other in Service::ALL {
            // Only the vm-agent and the image-agent have operations.
            if other != service || !matches!(service, Service::Vm | Service::Image) {
                forbidden.insert(format!("bothy.local.event.{}.op.1.accepted", other.token()));
            }
        }
        for to in &forbidden {
            raw.nats.publish(to.clone(), "".into()).await.unwrap();
        }
        assert_eq!(raw.refused().await, forbidden, "{service:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_is_allowed_once_and_only_to_who_asked() {
    let bus = TestBus::start();
    let host = &bus.config.host;
    let mut net = Raw::connect(&bus, Service::Net).await;
    let gateway = Raw::connect(&bus, Service::Gateway).await;
    let method = subject::of(host, Service::Net, "host", "show");
    let mut served = net.nats.subscribe(method.clone()).await.unwrap();
    // Else the request may be there before the subscription, which a flush only sends.
    assert_eq!(net.refused().await, BTreeSet::new());
    let asked = tokio::spawn(async move { gateway.nats.request(method, "{}".into()).await });
    let request = timeout(Duration::from_secs(10), served.next()).await.unwrap().unwrap();
    let reply = request.reply.unwrap();
    net.nats.publish(reply.clone(), "one".into()).await.unwrap();
    net.nats.publish(reply.clone(), "two".into()).await.unwrap();
    assert_eq!(net.refused().await, BTreeSet::from([reply.to_string()]));
    assert_eq!(asked.await.unwrap().unwrap().payload, "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_identity_there_is_no_access() {
    let bus = TestBus::start();
    assert!(async_nats::connect(bus.config.bus_url()).await.is_err());
}

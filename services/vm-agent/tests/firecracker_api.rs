//! The Firecracker client: every request that it can send against the schema that the Firecracker project publishes for its
//! API, and its errors over a real socket.
//!
//! The schema is not ours to keep here: `BOTHY_FIRECRACKER_SCHEMA` names the file, or it is found beside the workspace, as
//! `../shared/firecracker/api-1.16.1.yaml`.
#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod host;

use bothy_vm_agent::vmm::{
    Accel, Driver, Firecracker, Memory, Origin, Snapshot, Verb, VmPlan,
    firecracker::{
        Version,
        api::{
            Action, BackendType, Balloon, BalloonPatch, BootSource, CacheType, Drive, DrivePatch, Entropy,
            InstanceInfo, Level, Logger, MachineConfig, MemoryBackend, Method, Metrics, NetworkInterface,
            NetworkOverride, Request, SnapshotCreate, SnapshotLoad, SnapshotType, VmState, Vsock,
            VsockOverride,
        },
        client::{self, ApiError},
    },
    wire::Monitor,
};
use http_body_util::{BodyExt, Full};
use hyper::{Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use yaml_rust2::{Yaml, YamlLoader};

/// The schema's text, if it is to be had.
fn schema_file() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("BOTHY_FIRECRACKER_SCHEMA") {
        return Some(named.into());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let beside = workspace.join("../shared/firecracker/api-1.16.1.yaml");
    beside.is_file().then_some(beside)
}

/// As much of a Swagger 2.0 validator as the schema of Firecracker needs.
struct Schema(Yaml);

impl Schema {
    fn load(test: &str) -> Option<Self> {
        let Some(file) = schema_file() else {
            host::not_checked(
                test,
                "no schema of Firecracker's API; BOTHY_FIRECRACKER_SCHEMA names its file",
            );
            return None;
        };
        let text = fs_err::read_to_string(file).unwrap();
        Some(Self(YamlLoader::load_from_str(&text).unwrap().remove(0)))
    }

    /// The operation that `request` is, its path's parameters aside.
    fn operation(&self, request: &Request) -> Result<&Yaml, String> {
        let method = match request.method {
            Method::Get => "get",
            Method::Put => "put",
            Method::Patch => "patch",
        };
        let paths = self.0["paths"].as_hash().unwrap();
        let fits = |template: &str| {
            let (mut a, mut b) = (template.split('/'), request.path.split('/'));
            loop {
                match (a.next(), b.next()) {
                    (None, None) => return true,
                    (Some(a), Some(b)) if a == b || (a.starts_with('{') && !b.is_empty()) => {}
                    _ => return false,
                }
            }
        };
        let path = paths.iter().find(|(template, _)| fits(template.as_str().unwrap()));
        let (_, path) = path.ok_or_else(|| format!("{}: there is no such path", request.path))?;
        match &path[method] {
            Yaml::BadValue => Err(format!("{request}: there is no such method")),
            operation => Ok(operation),
        }
    }

    /// What is wrong with `request`, if anything.
    fn check(&self, request: &Request) -> Result<(), String> {
        let operation = self.operation(request)?;
        let parameters = operation["parameters"].as_vec().cloned().unwrap_or_default();
        let body = parameters.iter().find(|p| p["in"].as_str() == Some("body"));
        match (body, &request.body) {
            (Some(parameter), Some(body)) => self.fits(body, &parameter["schema"], &request.to_string())?,
            (None, Some(_)) => return Err(format!("{request}: takes no body")),
            (Some(parameter), None) if parameter["required"].as_bool() == Some(true) => {
                return Err(format!("{request}: needs a body"));
            }
            (_, None) => {}
        }
        // The client knows 200 with a body, 204 without, and takes all else for a fault.
        for (status, response) in operation["responses"].as_hash().unwrap() {
            let has_body = !response["schema"].is_badvalue();
            let known = match status {
                Yaml::Integer(200) => has_body,
                Yaml::Integer(204) => !has_body,
                Yaml::Integer(400..=599) => {
                    response["schema"]["$ref"].as_str() == Some("#/definitions/Error")
                }
                Yaml::String(word) if word == "default" => {
                    response["schema"]["$ref"].as_str() == Some("#/definitions/Error")
                }
                _ => false,
            };
            if !known {
                return Err(format!("{request}: the client does not know the answer {status:?}"));
            }
        }
        Ok(())
    }

    fn fits(&self, value: &Value, schema: &Yaml, at: &str) -> Result<(), String> {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.strip_prefix("#/definitions/").ok_or("an odd reference")?;
            let definition = &self.0["definitions"][name];
            if definition.is_badvalue() {
                return Err(format!("{at}: the schema has no {name}"));
            }
            return self.fits(value, definition, at);
        }
        if let Some(allowed) = schema["enum"].as_vec()
            && !allowed.iter().any(|a| a.as_str() == value.as_str())
        {
            return Err(format!("{at}: {value} is none of {allowed:?}"));
        }
        let wrong = |kind: &str| Err(format!("{at}: {value} is no {kind}"));
        match schema["type"].as_str() {
            Some("string") if !value.is_string() => wrong("string"),
            Some("boolean") if !value.is_boolean() => wrong("boolean"),
            Some("integer") => {
                let Some(number) = value.as_i64() else { return wrong("integer") };
                let (least, most) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
                if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
                    return Err(format!("{at}: {number} is not within {least:?} and {most:?}"));
                }
                Ok(())
            }
            Some("array") => {
                let Some(items) = value.as_array() else { return wrong("array") };
                let mut each = items.iter().enumerate();
                each.try_for_each(|(i, item)| self.fits(item, &schema["items"], &format!("{at}[{i}]")))
            }
            Some("object") => self.object(value, schema, at),
            Some("string" | "boolean") => Ok(()),
            other => Err(format!("{at}: this validator does not know type {other:?}")),
        }
    }

    fn object(&self, value: &Value, schema: &Yaml, at: &str) -> Result<(), String> {
        let Some(object) = value.as_object() else { return Err(format!("{at}: {value} is no object")) };
        for required in schema["required"].as_vec().into_iter().flatten() {
            if !object.contains_key(required.as_str().unwrap()) {
                return Err(format!("{at}: {} is missing", required.as_str().unwrap()));
            }
        }
        for (name, value) in object {
            match &schema["properties"][name.as_str()] {
                Yaml::BadValue => return Err(format!("{at}: there is no property {name}")),
                property => self.fits(value, property, &format!("{at} {name}"))?,
            }
        }
        Ok(())
    }
}

fn plan() -> VmPlan {
    VmPlan {
        vm: "0192f0c1-2345-7000-8000-000000000001".parse().unwrap(),
        name: "green-hut".into(),
        dir: "/run/bothy/vm/1".into(),
        kernel: "/store/vmlinux".into(),
        initrd: "/store/initrd".into(),
        rootfs: "/store/rootfs.img".into(),
        system: Some("/disks/system.img".into()),
        work: "/disks/work.img".into(),
        cpus: 2,
        memory_mib: 512,
        memory: Memory::Own,
        from: Origin::Boot,
        tap: "bothy-tap-0".into(),
        mac: "52:54:00:00:00:02".into(),
        uid: 780_000,
        groups: vec![],
        accel: Accel::Kvm,
        tsc_khz: None,
    }
}

/// Everything that can be sent, each with as much in it as it can have.
fn all() -> Vec<Request> {
    let mut all = vec![
        Request::describe(),
        Request::version(),
        Request::machine(&MachineConfig {
            vcpu_count: 32,
            mem_size_mib: 64 << 10,
            smt: true,
            track_dirty_pages: true,
        }),
        Request::boot_source(&BootSource {
            kernel_image_path: "/k".into(),
            initrd_path: Some("/i".into()),
            boot_args: Some("quiet".into()),
        }),
        Request::boot_source(&BootSource {
            kernel_image_path: "/k".into(),
            initrd_path: None,
            boot_args: None,
        }),
        Request::redrive(&DrivePatch { drive_id: "work".into(), path_on_host: "/w".into() }),
        Request::network(&NetworkInterface {
            iface_id: "net".into(),
            host_dev_name: "tap0".into(),
            guest_mac: None,
        }),
        Request::network(&NetworkInterface {
            iface_id: "net".into(),
            host_dev_name: "tap0".into(),
            guest_mac: Some("52:54:00:00:00:02".into()),
        }),
        Request::vsock(&Vsock { guest_cid: 3, uds_path: "/v".into() }),
        Request::entropy(&Entropy {}),
        Request::balloon(&Balloon { amount_mib: 64, deflate_on_oom: true, stats_polling_interval_s: 1 }),
        Request::inflate(&BalloonPatch { amount_mib: 64 }),
        Request::metrics(&Metrics { metrics_path: "/m".into() }),
        Request::save(&SnapshotCreate {
            snapshot_path: "/s".into(),
            mem_file_path: "/m".into(),
            snapshot_type: SnapshotType::Full,
        }),
        Request::save(&SnapshotCreate {
            snapshot_path: "/s".into(),
            mem_file_path: "/m".into(),
            snapshot_type: SnapshotType::Diff,
        }),
    ];
    all.extend([CacheType::Unsafe, CacheType::Writeback].map(|cache_type| {
        Request::drive(&Drive {
            drive_id: "work".into(),
            path_on_host: "/w".into(),
            is_root_device: false,
            is_read_only: true,
            cache_type,
        })
    }));
    all.extend([Level::Error, Level::Warning, Level::Info, Level::Debug].map(|level| {
        Request::logger(&Logger { log_path: "/l".into(), level, show_level: true, show_log_origin: true })
    }));
    all.extend([Action::InstanceStart, Action::SendCtrlAltDel, Action::FlushMetrics].map(Request::action));
    all.extend([VmState::Paused, VmState::Resumed].map(Request::vm));
    for backend_type in [BackendType::File, BackendType::Uffd] {
        let load = SnapshotLoad {
            snapshot_path: "/s".into(),
            mem_backend: MemoryBackend { backend_type, backend_path: "/m".into() },
            resume_vm: true,
            network_overrides: vec![],
            vsock_override: None,
        };
        all.push(Request::load(&load));
        all.push(Request::load(&SnapshotLoad {
            network_overrides: vec![NetworkOverride { iface_id: "net".into(), host_dev_name: "tap1".into() }],
            vsock_override: Some(VsockOverride { uds_path: "/v".into() }),
            ..load
        }));
    }
    all
}

#[test]
fn every_request_is_one_that_the_published_schema_knows() {
    let Some(schema) = Schema::load("every_request_is_one_that_the_published_schema_knows") else { return };
    let driver = Firecracker::new("firecracker", Version::from_words("1.16.1").unwrap());
    let Monitor::Api { requests } = driver.launch_spec(&plan()).unwrap().monitor else {
        panic!("no requests")
    };
    let from = Snapshot { state: "/s".into(), memory: "/m".into() };
    let saved = VmPlan { from: Origin::Template(from), ..plan() };
    let Monitor::Api { requests: resumed } = driver.launch_spec(&saved).unwrap().monitor else {
        panic!("no requests")
    };
    let verbs = [
        driver.powerdown(),
        driver.pause(),
        driver.resume(),
        driver.run_state(),
        driver.resize_disk("work", 1 << 30),
    ];
    let verbs = verbs.into_iter().filter_map(|verb| match verb {
        Verb::Api(request) => Some(request),
        _ => None,
    });
    let mut checked = 0;
    for request in all().into_iter().chain(requests).chain(resumed).chain(verbs) {
        schema.check(&request).unwrap();
        checked += 1;
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn the_validator_sees_what_is_wrong() {
    let Some(schema) = Schema::load("the_validator_sees_what_is_wrong") else { return };
    let put = |path: &str, body: Value| Request { method: Method::Put, path: path.into(), body: Some(body) };
    for (request, why) in [
        (put("/nonsense", json!({})), "no such path"),
        (put("/drives/", json!({})), "no such path"),
        (Request { body: Some(json!({})), ..Request::describe() }, "takes no body"),
        (Request { method: Method::Put, ..Request::describe() }, "no such method"),
        (Request { body: None, ..Request::vm(VmState::Paused) }, "needs a body"),
        (put("/boot-source", json!({})), "kernel_image_path is missing"),
        (put("/boot-source", json!({ "kernel_image_path": 1 })), "no string"),
        (put("/boot-source", json!({ "kernel_image_path": "/k", "extra": 1 })), "no property extra"),
        (put("/actions", json!({ "action_type": "InstanceStop" })), "is none of"),
        (put("/machine-config", json!({ "vcpu_count": 33, "mem_size_mib": 1 })), "33 is not within"),
        (put("/vsock", json!({ "guest_cid": 2, "uds_path": "/v" })), "2 is not within"),
        (
            put(
                "/snapshot/load",
                json!({ "snapshot_path": "/s", "network_overrides": [{ "iface_id": "net" }] }),
            ),
            "host_dev_name is missing",
        ),
    ] {
        let said = schema.check(&request).unwrap_err();
        assert!(said.contains(why), "{request}: {said}");
    }
}

/// Answers one connection after the other in one way, and gives what it was asked.
async fn server(
    socket: &Path,
    status: u16,
    answer: &'static str,
) -> tokio::sync::mpsc::UnboundedReceiver<(String, String)> {
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    let (asked, questions) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = asked.clone();
            let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let asked = asked.clone();
                async move {
                    let line = format!("{} {}", request.method(), request.uri());
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    asked.send((line, String::from_utf8(body.to_vec()).unwrap())).unwrap();
                    let body = Full::new(Bytes::from_static(answer.as_bytes()));
                    Response::builder().status(status).body(body)
                }
            });
            drop(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        }
    });
    questions
}

#[tokio::test]
async fn answers_and_faults_come_through() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);

    let mut asked = server(&at("done"), 204, "").await;
    assert_eq!(client::call(&at("done"), &Request::vm(VmState::Paused)).await.unwrap(), Value::Null);
    assert_eq!(asked.recv().await.unwrap(), ("PATCH /vm".into(), r#"{"state":"Paused"}"#.into()));

    let said = r#"{"app_name":"Firecracker","id":"x","state":"Not started","vmm_version":"1.16.1"}"#;
    let mut asked = server(&at("tells"), 200, said).await;
    let answer = client::call(&at("tells"), &Request::describe()).await.unwrap();
    let info: InstanceInfo = serde_json::from_value(answer).unwrap();
    assert_eq!((info.state.as_str(), info.vmm_version.as_str()), ("Not started", "1.16.1"));
    assert_eq!(asked.recv().await.unwrap(), ("GET /".into(), String::new()));

    let _asked =
        server(&at("refuses"), 400, r#"{"fault_message":"Open tap device failed: no such device"}"#).await;
    let e = client::call(&at("refuses"), &Request::action(Action::InstanceStart)).await.unwrap_err();
    assert_eq!(
        e.to_string(),
        "PUT /actions: Firecracker refused with status 400: Open tap device failed: no such device"
    );

    let _asked = server(&at("mute"), 500, "oh no").await;
    let e = client::call(&at("mute"), &Request::version()).await.unwrap_err();
    assert!(e.to_string().ends_with("status 500: it gave no reason: `oh no`"), "{e}");

    let _asked = server(&at("odd"), 200, "<html>").await;
    let e = client::call(&at("odd"), &Request::version()).await.unwrap_err();
    assert!(matches!(e, ApiError::Odd { .. }), "{e}");
}

#[tokio::test]
async fn a_socket_without_a_firecracker_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let e = client::call(&socket, &Request::version()).await.unwrap_err();
    assert!(matches!(e, ApiError::Connect(_)), "{e}");
    // One that dies while it is asked: nobody knows whether it did it.
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let dies = async { drop(listener.accept().await) };
    let version = Request::version();
    let (e, ()) = tokio::join!(client::call(&socket, &version), dies);
    let e = e.unwrap_err();
    assert!(matches!(e, ApiError::Broken { .. }), "{}", client::chain(&e));
    // One that answers without end.
    let endless = dir.path().join("endless");
    let listener = tokio::net::UnixListener::bind(&endless).unwrap();
    let flood = async {
        use tokio::io::AsyncWriteExt;
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await.unwrap();
        while stream.write_all(&[b' '; 4096]).await.is_ok() {}
    };
    let (e, ()) = tokio::join!(client::call(&endless, &version), flood);
    assert!(matches!(e.unwrap_err(), ApiError::Broken { .. }));
}

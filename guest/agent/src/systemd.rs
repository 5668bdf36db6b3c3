//! What systemd says of units, and what it is to do with them, on its private socket (`/run/systemd/private`): D-Bus without
//! a bus, so it answers as soon as systemd has started, whether the image has dbus or not, and costs no process. The methods
//! are those of org.freedesktop.systemd1(5); [`wire`] is the part of D-Bus that they need and no more.

mod wire;

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use wire::{Reader, Writer, call};

/// Where systemd listens.
pub(crate) const SOCKET: &str = "/run/systemd/private";

/// The longest answer that is read: one unit's part is under 1 KiB.
const MAX_MESSAGE: usize = 256 << 10;
/// The longest line of the handshake.
const MAX_LINE: usize = 1 << 10;
/// How long systemd may take to answer once it accepted the connection.
const ANSWER: Duration = Duration::from_secs(20);

/// Between two questions whether a job has ended.
const POLL: Duration = Duration::from_millis(20);

const DESTINATION: &str = "org.freedesktop.systemd1";
const MANAGER: [&str; 2] = ["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];

const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// What systemd knows of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) name: String,
    /// `loaded`, `not-found`, `masked`, `error`, `bad-setting`.
    pub(crate) load: String,
    /// `active`, `activating`, `inactive`, `failed`, `reloading`, `deactivating`.
    pub(crate) active: String,
    /// The unit type's own word: `running`, `auto-restart`, `dead`.
    pub(crate) sub: String,
    /// Something is being done with it.
    pub(crate) busy: bool,
    /// Its object.
    pub(crate) path: String,
}

/// What is to be done with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Restart it, if it is active.
    TryRestart,
}

impl Act {
    fn method(self) -> &'static str {
        match self {
            Self::Start => "StartUnit",
            Self::Stop => "StopUnit",
            Self::TryRestart => "TryRestartUnit",
        }
    }
}

/// Whether `name` may be asked for: a unit's name (systemd.unit(5)), not an option or a path.
pub(crate) fn is_unit_name(name: &str) -> bool {
    name.len() <= 255
        && name.contains('.')
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-.@_:\\".contains(c))
}

/// A conversation with systemd.
#[derive(Debug)]
pub(crate) struct Manager {
    stream: UnixStream,
    serial: u32,
}

impl Manager {
    /// Connects as root and goes through the handshake (D-Bus specification, "Authentication Protocol").
    ///
    /// # Errors
    /// When nobody listens yet, or it is not D-Bus.
    pub(crate) async fn connect(socket: &Path) -> io::Result<Self> {
        within(async {
            let mut stream = UnixStream::connect(socket).await?;
            // 30 is `0`, root's number, in hex. `BEGIN` goes with it, before the answer is there: systemd may read what comes
            // behind a later `BEGIN` together with that, and then sleeps with our call in its buffer.
            stream.write_all(b"\0AUTH EXTERNAL 30\r\nBEGIN\r\n").await?;
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                if line.len() == MAX_LINE {
                    return Err(odd("a handshake line without an end"));
                }
                line.push(stream.read_u8().await?);
            }
            if !line.starts_with(b"OK ") {
                return Err(odd(&format!(
                    "refused the handshake: {}",
                    String::from_utf8_lossy(&line).trim()
                )));
            }
            Ok(Self { stream, serial: 0 })
        })
        .await
    }

    /// What systemd knows of `unit`; it reads the unit's file if it has not yet.
    ///
    /// # Errors
    /// When systemd refuses, or is gone.
    pub(crate) async fn unit(&mut self, unit: &str) -> io::Result<Unit> {
        self.units(&[unit]).await?.into_iter().next().ok_or_else(|| odd("an answer without the unit"))
    }

    /// The same for several units.
    ///
    /// # Errors
    /// When systemd refuses, or is gone.
    pub(crate) async fn units(&mut self, units: &[&str]) -> io::Result<Vec<Unit>> {
        let mut body = Writer::default();
        body.texts(units);
        let answer = self.ask(MANAGER, "ListUnitsByNames", "as", &body.0).await?;
        read_units(&answer).ok_or_else(|| odd("an answer without the unit"))
    }

    /// The active timers that go by the calendar.
    ///
    /// # Errors
    /// When systemd refuses, or is gone.
    pub(crate) async fn calendar_timers(&mut self) -> io::Result<Vec<String>> {
        let mut body = Writer::default();
        body.texts(&["active"]);
        body.texts(&["*.timer"]);
        let answer = self.ask(MANAGER, "ListUnitsByPatterns", "asas", &body.0).await?;
        let timers = read_units(&answer).ok_or_else(|| odd("an answer that lists no units"))?;
        let mut names = Vec::new();
        for timer in timers {
            let mut body = Writer::default();
            body.text("org.freedesktop.systemd1.Timer");
            body.text("NextElapseUSecRealtime");
            let object = [timer.path.as_str(), "org.freedesktop.DBus.Properties"];
            let answer = self.ask(object, "Get", "ss", &body.0).await?;
            // A variant: its signature, and the number.
            let mut reader = Reader::new(&answer);
            let next = (|| {
                let _signature = reader.take(3)?;
                reader.long()
            })();
            // Without a next time on the calendar it is one of the two.
            if !matches!(next, None | Some(0 | u64::MAX)) {
                names.push(timer.name);
            }
        }
        Ok(names)
    }

    /// Has systemd begin to do something with `unit`.
    ///
    /// # Errors
    /// When systemd refuses: it has no such unit, say; or is gone.
    pub(crate) async fn act(&mut self, act: Act, unit: &str) -> io::Result<()> {
        let mut body = Writer::default();
        body.text(unit);
        body.text("replace");
        self.ask(MANAGER, act.method(), "ss", &body.0).await.map(drop)
    }

    /// Waits until nothing is being done with `units` any more; how they are then.
    ///
    /// # Errors
    /// When systemd is gone, or it takes longer than `patience`.
    pub(crate) async fn settled(&mut self, units: &[&str], patience: Duration) -> io::Result<Vec<Unit>> {
        let until = tokio::time::Instant::now() + patience;
        loop {
            let now = self.units(units).await?;
            let Some(busy) = now.iter().find(|unit| unit.busy) else { return Ok(now) };
            if tokio::time::Instant::now() > until {
                let text = format!("unit {} is still {} ({})", busy.name, busy.active, busy.sub);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The body of the answer to a call.
    async fn ask(
        &mut self,
        [object, interface]: [&str; 2],
        method: &str,
        signature: &str,
        body: &[u8],
    ) -> io::Result<Vec<u8>> {
        self.serial += 1;
        let call = call(self.serial, DESTINATION, [object, interface, method], signature, body);
        within(async {
            self.stream.write_all(&call).await?;
            loop {
                let (kind, body) = self.message().await?;
                match kind {
                    METHOD_RETURN => return Ok(body),
                    ERROR => {
                        let text = Reader::new(&body).text().unwrap_or("no reason").to_owned();
                        return Err(io::Error::other(format!("systemd: {text}")));
                    }
                    _ => {} // a signal
                }
            }
        })
        .await
    }

    /// The next message: its type and its body.
    async fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).await?;
        let [endian, kind, _, _, body @ ..] = head;
        let [b0, b1, b2, b3, _, _, _, _, f0, f1, f2, f3] = body;
        if endian != b'l' {
            return Err(odd("a message in the other byte order"));
        }
        let size = |bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX);
        let (body, fields) = (size([b0, b1, b2, b3]), size([f0, f1, f2, f3]));
        if body > MAX_MESSAGE || fields > MAX_MESSAGE {
            return Err(odd(&format!("a message of {body} and {fields} bytes")));
        }
        // The fields are padded to 8, counted from the message's start, as is everything.
        let mut rest = vec![0; fields.next_multiple_of(8) + body];
        self.stream.read_exact(&mut rest).await?;
        Ok((kind, rest.split_off(fields.next_multiple_of(8))))
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(ANSWER, work)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "systemd does not answer")))
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("systemd's private socket: {what}"))
}

/// An answer's units: `a(ssssssouso)`, of which name, description, load, active and sub state come first, then whom it follows,
/// its object, and what is being done with it: a number, 0 for nothing, a word and an object.
fn read_units(body: &[u8]) -> Option<Vec<Unit>> {
    let mut reader = Reader::new(body);
    let length = reader.number()?;
    reader.align(8)?;
    let end = reader.place().checked_add(length)?;
    let mut units = Vec::new();
    while !reader.is_at(end) {
        reader.align(8)?;
        let mut text = || reader.text().map(str::to_owned);
        let (name, _description, load, active, sub) = (text()?, text()?, text()?, text()?, text()?);
        let (_follows, path) = (text()?, text()?);
        let busy = reader.number()? != 0;
        let (_job, _object) = (reader.text()?, reader.text()?);
        units.push(Unit { name, load, active, sub, busy, path });
    }
    Some(units)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_names_are_neither_options_nor_paths() {
        for good in ["ssh.service", "a@b.service", "dev-vda.device", r"x\x2dy.mount"] {
            assert!(is_unit_name(good), "{good}");
        }
        for bad in ["", "ssh", "-x.service", "../a.service", "a b.service", "a\n.service"] {
            assert!(!is_unit_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_unit_is_read_from_an_answer_and_never_from_a_part_of_one() {
        // Behind the length, which is not counted, and its padding.
        let mut units = Writer::default();
        for (name, state, job) in [("a.service", "failed", 0), ("b.timer", "active", 7)] {
            units.align(8);
            for text in [name, "What it is", "loaded", state, state, "", "/unit/x"] {
                units.text(text);
            }
            units.number(job);
            units.text("restart");
            units.text("/job/7");
        }
        let mut body = Writer::default();
        body.number(units.0.len());
        body.align(8);
        body.0.extend(units.0);
        let unit = |name: &str, state: &str, busy| Unit {
            name: name.into(),
            load: "loaded".into(),
            active: state.into(),
            sub: state.into(),
            busy,
            path: "/unit/x".into(),
        };
        assert_eq!(
            read_units(&body.0),
            Some(vec![unit("a.service", "failed", false), unit("b.timer", "active", true)])
        );
        for end in 0..body.0.len() {
            let part = body.0.get(..end).unwrap();
            assert_eq!(read_units(part), None, "{end} bytes");
        }
        let huge = [255, 255, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 1, 1];
        assert_eq!(read_units(&huge), None);
        assert_eq!(read_units(&[0; 8]), Some(vec![]));
    }

    /// A real D-Bus server, which checks every byte of a message and hangs up at the first wrong one, takes the call. There is
    /// no systemd on it, and it says so.
    #[tokio::test]
    async fn a_real_server_understands_the_call() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let config = format!(
            "<busconfig><listen>unix:path={}</listen><policy context='default'><allow send_destination='*'/><allow receive_sender='*'/>\
             <allow own='*'/></policy></busconfig>",
            socket.display()
        );
        fs_err::write(dir.path().join("conf"), config).unwrap();
        let mut server = std::process::Command::new("dbus-daemon");
        server.args(["--nofork", "--nopidfile", "--nosyslog", "--config-file"]).arg(dir.path().join("conf"));
        let Ok(mut server) = server.spawn() else { return };
        let mut manager = loop {
            match Manager::connect(&socket).await {
                Ok(manager) => break manager,
                Err(error) => assert!(server.try_wait().unwrap().is_none(), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        // A bus wants to be greeted; systemd's private socket is none.
        let bus = "org.freedesktop.DBus";
        let hello = call(100, bus, ["/org/freedesktop/DBus", bus, "Hello"], "", &[]);
        manager.stream.write_all(&hello).await.unwrap();
        let refused = manager.unit("ssh.service").await;
        let greeted = manager.unit("dev-vd\\x2da.device").await;
        let acted = manager.act(Act::TryRestart, "ssh.service").await;
        let timers = manager.calendar_timers().await;
        server.kill().unwrap();
        server.wait().unwrap();
        for told in [acted.unwrap_err(), timers.unwrap_err()] {
            assert!(told.to_string().contains("org.freedesktop.systemd1"), "{told}");
        }
        // The answer to the greeting is taken for an answer without a unit.
        assert!(refused.unwrap_err().to_string().contains("without the unit"));
        let told = greeted.unwrap_err().to_string();
        assert!(told.contains("org.freedesktop.systemd1"), "{told}");
    }
}

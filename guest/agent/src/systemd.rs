//! What systemd says of a unit, asked on its private socket (`/run/systemd/private`): D-Bus without a bus, so it answers
//! as soon as systemd has started, whether the image has dbus or not, and costs no process. One method is enough,
//! `ListUnitsByNames` (org.freedesktop.systemd1(5)), so this is the part of the D-Bus wire format that it needs and no more.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Where systemd listens.
pub(crate) const SOCKET: &str = "/run/systemd/private";

/// The longest answer that is read: one unit's is under 1 KiB.
const MAX_MESSAGE: usize = 64 << 10;
/// The longest line of the handshake.
const MAX_LINE: usize = 1 << 10;
/// How long systemd may take to answer once it accepted the connection.
const ANSWER: Duration = Duration::from_secs(20);

const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// What systemd knows of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unit {
    /// `loaded`, `not-found`, `masked`, `error`, `bad-setting`.
    pub(crate) load: String,
    /// `active`, `activating`, `inactive`, `failed`, `reloading`, `deactivating`.
    pub(crate) active: String,
    /// The unit type's own word: `running`, `auto-restart`, `dead`.
    pub(crate) sub: String,
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
        self.serial += 1;
        let call = list_units_by_names(self.serial, unit);
        within(async {
            self.stream.write_all(&call).await?;
            loop {
                let (kind, body) = self.message().await?;
                match kind {
                    METHOD_RETURN => {
                        return first_unit(&body).ok_or_else(|| odd("an answer without the unit"));
                    }
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

/// The call, in little-endian D-Bus.
fn list_units_by_names(serial: u32, unit: &str) -> Vec<u8> {
    let mut names = Writer::default();
    names.text(unit);
    let mut body = Writer::default();
    body.number(names.0.len());
    body.0.extend(names.0);
    let to = ["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "ListUnitsByNames"];
    call(serial, "org.freedesktop.systemd1", to, "as", &body.0)
}

/// A call of `method`, of an interface of an object of `destination`.
fn call(
    serial: u32,
    destination: &str,
    [object, interface, method]: [&str; 3],
    signature: &str,
    body: &[u8],
) -> Vec<u8> {
    let mut fields = Writer::default();
    fields.field(1, "o", object);
    fields.field(2, "s", interface);
    fields.field(3, "s", method);
    fields.field(6, "s", destination);
    fields.align(8);
    fields.0.push(8);
    fields.signature("g");
    fields.signature(signature);

    let mut message = Writer(vec![b'l', 1, 0, 1]);
    message.number(body.len());
    message.0.extend(serial.to_le_bytes());
    message.number(fields.0.len());
    message.0.extend(fields.0);
    message.align(8);
    message.0.extend(body);
    message.0
}

/// Bytes in the making, aligned from their beginning: what they are put behind must end at a multiple of 8.
#[derive(Debug, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn number(&mut self, number: usize) {
        self.align(4);
        self.0.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len());
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// One header field: a number, and a variant that holds a text or path.
    fn field(&mut self, code: u8, kind: &str, value: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(kind);
        self.text(value);
    }
}

/// The answer's first unit: `a(ssssssouso)`, of which name, description, load, active and sub state come first.
fn first_unit(body: &[u8]) -> Option<Unit> {
    let mut reader = Reader::new(body);
    reader.number()?;
    reader.align(8)?;
    let mut text = || reader.text().map(str::to_owned);
    let (_name, _description) = (text()?, text()?);
    Some(Unit { load: text()?, active: text()?, sub: text()? })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) -> Option<()> {
        self.at = self.at.checked_next_multiple_of(to)?;
        Some(())
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn number(&mut self) -> Option<usize> {
        self.align(4)?;
        usize::try_from(u32::from_le_bytes(self.take(4)?.try_into().ok()?)).ok()
    }

    fn text(&mut self) -> Option<&'a str> {
        let count = self.number()?;
        let text = self.take(count)?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }
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
        let mut body = Writer::default();
        body.number(0);
        body.align(8);
        for text in ["a.service", "A service", "loaded", "failed", "failed"] {
            body.text(text);
        }
        let unit = Unit { load: "loaded".into(), active: "failed".into(), sub: "failed".into() };
        assert_eq!(first_unit(&body.0), Some(unit));
        for end in 0..body.0.len() {
            let part = body.0.get(..end).unwrap();
            assert_eq!(first_unit(part), None, "{end} bytes");
        }
        let huge = [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 1, 1];
        assert_eq!(first_unit(&huge), None);
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
        server.kill().unwrap();
        server.wait().unwrap();
        // The answer to the greeting is taken for an answer without a unit.
        assert!(refused.unwrap_err().to_string().contains("without the unit"));
        let told = greeted.unwrap_err().to_string();
        assert!(told.contains("org.freedesktop.systemd1"), "{told}");
    }
}

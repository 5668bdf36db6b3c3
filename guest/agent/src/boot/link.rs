//! The link between PID 1 and the agent: a socket pair, lines of text. PID 1 sends the boot's first steps; the agent
//! sends one order. PID 1's end closes when it becomes the image's init, which tells the agent that this worked.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use crate::timeline::Step;

/// What the agent asks of PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Become the image's `/sbin/init`.
    Systemd,
    /// Switch the root and stay PID 1.
    Stay,
    /// Power the machine off.
    PowerOff,
    /// Restart the machine.
    Reboot,
}

impl Order {
    const ALL: [(Self, u8); 4] =
        [(Self::Systemd, b'i'), (Self::Stay, b's'), (Self::PowerOff, b'p'), (Self::Reboot, b'r')];

    /// The order as the one byte that crosses the link.
    pub(crate) fn byte(self) -> u8 {
        Self::ALL.iter().find(|(order, _)| *order == self).map_or(0, |(_, byte)| *byte)
    }

    /// Reads the byte of [`Order::byte`].
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == byte).map(|(order, _)| *order)
    }
}

/// What PID 1 answers when it stays: its root is switched.
pub(super) const STAYED: &[u8] = b"+";

/// Sends the steps so far, then an empty line.
pub(super) fn send_steps(link: &mut UnixStream, steps: &[Step]) -> io::Result<()> {
    let text: String = steps.iter().map(|step| step.to_line() + "\n").collect();
    link.write_all((text + "\n").as_bytes())
}

/// The agent's side of [`send_steps`].
///
/// # Errors
/// When the link fails.
pub(crate) fn receive_steps(link: &UnixStream) -> io::Result<Vec<Step>> {
    // One byte per read: nothing that follows the empty line may end up in a buffer of ours.
    let mut lines = BufReader::with_capacity(1, link).lines();
    let mut steps = Vec::new();
    while let Some(line) = lines.next().transpose()? {
        if line.is_empty() {
            break;
        }
        steps.extend(Step::parse(&line));
    }
    Ok(steps)
}

/// Waits for the agent's order; its death is an error.
pub(super) fn wait(link: &mut UnixStream) -> io::Result<Order> {
    let mut byte = [0];
    if link.read(&mut byte)? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the agent ended before the guest was personalised",
        ));
    }
    let [byte] = byte;
    Order::from_byte(byte).ok_or_else(|| io::Error::other(format!("the agent said {byte}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_orders_cross_the_link() {
        let (mut pid1, mut agent) = UnixStream::pair().unwrap();
        let steps = vec![
            Step { name: "kernel".into(), started_us: 0, took_us: 1 },
            Step { name: "modules".into(), started_us: 1, took_us: 2 },
        ];
        send_steps(&mut pid1, &steps).unwrap();
        pid1.write_all(STAYED).unwrap();
        assert_eq!(receive_steps(&agent).unwrap(), steps);
        let mut byte = [0];
        agent.read_exact(&mut byte).unwrap();
        assert_eq!(byte, STAYED, "nothing after the steps is swallowed");
        for (order, _) in Order::ALL {
            agent.write_all(&[order.byte()]).unwrap();
            assert_eq!(wait(&mut pid1).unwrap(), order);
        }
        drop(agent);
        assert_eq!(wait(&mut pid1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

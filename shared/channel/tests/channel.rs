//! Both ends over pipes inside one process: what a virtio-serial port does to them, done on purpose.

#![expect(clippy::indexing_slicing, reason = "tests may panic")]

use bothy_channel::{MAX_FRAME, MAX_STREAMS, Stream, guest::Listener, host::Connector};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::UnixStream,
    time::timeout,
};

const LONG: Duration = Duration::from_secs(60);

/// What the tests' guest serves: port 1 echoes, port 2 counts bytes, port 3 sends as many as asked, port 4 swallows
/// nothing and says nothing.
async fn serve(mut listener: Listener) -> io::Error {
    loop {
        match listener.accept().await {
            Ok((port, stream)) => drop(tokio::spawn(answer(port, stream))),
            Err(err) => return err,
        }
    }
}

async fn answer(port: u32, mut stream: Stream) -> io::Result<()> {
    match port {
        1 => {
            let (mut read, mut write) = tokio::io::split(stream);
            tokio::io::copy(&mut read, &mut write).await?;
            write.shutdown().await
        }
        2 => {
            let mut count = 0u64;
            let mut sum = 0u64;
            let mut buf = vec![0; 64 << 10];
            loop {
                let n = stream.read(&mut buf).await?;
                if n == 0 {
                    break;
                }
                for (at, byte) in buf[..n].iter().enumerate() {
                    let at = count + at as u64;
                    sum = sum.wrapping_add((at % 251).wrapping_mul(u64::from(*byte) + 1));
                }
                count += n as u64;
            }
            stream.write_u64(count).await?;
            stream.write_u64(sum).await?;
            stream.shutdown().await
        }
        3 => {
            let mut left = stream.read_u64().await?;
            let block: Vec<u8> = (0..64u32 << 10).map(|i| (i % 253) as u8).collect();
            while left > 0 {
                let n = left.min(block.len() as u64) as usize;
                stream.write_all(&block[..n]).await?;
                left -= n as u64;
            }
            stream.shutdown().await
        }
        4 => {
            std::future::pending::<()>().await;
            Ok(())
        }
        _ => Ok(()),
    }
}

async fn echo(connector: &Connector, text: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = connector.open(1).await?;
    stream.write_all(text).await?;
    stream.shutdown().await?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await?;
    Ok(back)
}

/// A host and a guest with a pipe of `size` bytes each way between them.
fn pair(size: usize) -> Connector {
    let (host, guest) = tokio::io::duplex(size);
    tokio::spawn(serve(Listener::new(guest)));
    Connector::new(host)
}

#[tokio::test]
async fn a_stream_echoes_and_half_closes() {
    for size in [1, 100, 64 << 10] {
        let connector = pair(size);
        assert_eq!(timeout(LONG, echo(&connector, b"hello")).await.unwrap().unwrap(), b"hello");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_at_once_each_get_their_own_bytes_back() {
    let connector = pair(8 << 10);
    let tasks: Vec<_> = (0..MAX_STREAMS)
        .map(|i| {
            let connector = connector.clone();
            tokio::spawn(async move {
                let text: Vec<u8> = (0..10_000 + i).map(|at| (at * (i + 3)) as u8).collect();
                assert_eq!(echo(&connector, &text).await.unwrap(), text);
            })
        })
        .collect();
    for task in tasks {
        timeout(LONG, task).await.unwrap().unwrap();
    }
    // And again one after another, more than may be open at once: nothing is left counted.
    for _ in 0..3 * MAX_STREAMS {
        assert_eq!(timeout(LONG, echo(&connector, b"x")).await.unwrap().unwrap(), b"x");
    }
}

#[tokio::test]
async fn one_stream_too_many_is_refused_at_once_and_costs_the_others_nothing() {
    let connector = pair(64 << 10);
    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS {
        open.push(connector.open(1).await.unwrap());
    }
    assert_eq!(connector.open(1).await.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    open.pop();
    assert_eq!(echo(&connector, b"room again").await.unwrap(), b"room again");
    let first = &mut open[0];
    first.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    first.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"still here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_mebibytes_go_through_in_order_both_ways_while_pings_go_on() {
    const TOTAL: u64 = 100 << 20;
    let connector = pair(32 << 10);
    let up = tokio::spawn({
        let connector = connector.clone();
        async move {
            let mut stream = connector.open(2).await.unwrap();
            let (mut sent, mut sum) = (0u64, 0u64);
            let mut block = vec![0u8; 100_003];
            while sent < TOTAL {
                let n = block.len().min((TOTAL - sent) as usize);
                for (at, byte) in block[..n].iter_mut().enumerate() {
                    let at = sent + at as u64;
                    *byte = (at >> 8) as u8 ^ at as u8;
                    sum = sum.wrapping_add((at % 251).wrapping_mul(u64::from(*byte) + 1));
                }
                stream.write_all(&block[..n]).await.unwrap();
                sent += n as u64;
            }
            stream.shutdown().await.unwrap();
            assert_eq!(stream.read_u64().await.unwrap(), TOTAL);
            assert_eq!(stream.read_u64().await.unwrap(), sum);
        }
    });
    let down = tokio::spawn({
        let connector = connector.clone();
        async move {
            let mut stream = connector.open(3).await.unwrap();
            stream.write_u64(TOTAL).await.unwrap();
            let (mut got, mut buf) = (0u64, vec![0; 70_001]);
            loop {
                let n = stream.read(&mut buf).await.unwrap();
                if n == 0 {
                    break;
                }
                for (at, byte) in buf[..n].iter().enumerate() {
                    assert_eq!(*byte, ((got + at as u64) % (64 << 10) % 253) as u8);
                }
                got += n as u64;
            }
            assert_eq!(got, TOTAL);
        }
    });
    let mut pings = 0;
    while !(up.is_finished() && down.is_finished()) {
        assert_eq!(timeout(LONG, echo(&connector, b"ping")).await.unwrap().unwrap(), b"ping");
        pings += 1;
    }
    up.await.unwrap();
    down.await.unwrap();
    assert!(pings > 2, "only {pings} pings got between");
}

#[tokio::test]
async fn a_guest_may_come_later_than_the_host_and_unwanted_requests_are_forgotten() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let connector = Connector::new(host);
    assert!(timeout(Duration::from_millis(20), connector.open(1)).await.is_err());
    assert!(!connector.is_ready());
    let waiting = tokio::spawn({
        let connector = connector.clone();
        async move { echo(&connector, b"patience").await }
    });
    // What a guest that died early had read and written.
    let mut early = [0; 1000];
    guest.read_exact(&mut early).await.unwrap();
    guest.write_all(&early[..100]).await.unwrap();
    tokio::spawn(serve(Listener::new(guest)));
    timeout(LONG, connector.ready()).await.unwrap().unwrap();
    assert_eq!(timeout(LONG, waiting).await.unwrap().unwrap().unwrap(), b"patience");
}

/// A wire between two pipes that can be cut and joined to others, as a port is.
async fn relay(mut a: DuplexStream, mut b: DuplexStream) {
    drop(tokio::io::copy_bidirectional(&mut a, &mut b).await);
}

#[tokio::test]
async fn a_guest_that_starts_anew_resets_the_old_streams_and_serves_new_ones() {
    let (host, mut port) = tokio::io::duplex(64 << 10);
    let connector = Connector::new(host);

    let (near, guest) = tokio::io::duplex(64 << 10);
    let first = tokio::spawn(serve(Listener::new(guest)));
    let (wire, far) = tokio::io::duplex(64 << 10);
    let relaying = tokio::spawn(relay(near, far));
    // The port outlives both guests: `pump` moves bytes between it and whichever guest there is.
    let (swap_tx, mut swap) = tokio::sync::mpsc::channel::<DuplexStream>(1);
    let pump = tokio::spawn(async move {
        let mut guest = wire;
        let (mut to_guest, mut to_host) = (vec![0; 4096], vec![0; 4096]);
        loop {
            tokio::select! {
                Some(next) = swap.recv() => guest = next,
                n = port.read(&mut to_guest) => match n {
                    Ok(n) if n > 0 => { drop(guest.write_all(&to_guest[..n]).await); }
                    _ => return,
                },
                n = guest.read(&mut to_host) => match n {
                    Ok(n) if n > 0 => { drop(port.write_all(&to_host[..n]).await); }
                    _ => match swap.recv().await { Some(next) => guest = next, None => return },
                },
            }
        }
    });
    assert_eq!(timeout(LONG, echo(&connector, b"one")).await.unwrap().unwrap(), b"one");
    let mut old = connector.open(1).await.unwrap();
    let mut bulk = connector.open(3).await.unwrap();
    bulk.write_u64(u64::MAX).await.unwrap();
    bulk.read_u64().await.unwrap();

    first.abort();
    relaying.abort();
    let (wire, guest) = tokio::io::duplex(64 << 10);
    swap_tx.send(wire).await.unwrap();
    tokio::spawn(serve(Listener::new(guest)));

    let end = timeout(LONG, async {
        let mut sink = Vec::new();
        bulk.read_to_end(&mut sink).await
    });
    assert_eq!(end.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(
        timeout(LONG, old.read_u8()).await.unwrap().unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
    assert!(old.write_all(b"x").await.is_err());
    assert_eq!(timeout(LONG, echo(&connector, b"two")).await.unwrap().unwrap(), b"two");
    drop(connector);
    drop((old, bulk));
    timeout(LONG, pump).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_host_that_reconnects_with_stale_bytes_in_front_resets_and_works() {
    // The guest's side of the port stays; the host's side is a new one each time.
    let (mut port, guest) = tokio::io::duplex(1 << 20);
    let guest = tokio::spawn(serve(Listener::new(guest)));
    for round in 0..20u8 {
        let (host, mut wire) = tokio::io::duplex(64 << 10);
        let connector = Connector::new(host);
        let used = tokio::spawn(async move {
            assert_eq!(echo(&connector, &[round; 5000]).await.unwrap(), [round; 5000]);
            let mut stream = connector.open(1).await.unwrap();
            // Never read back: it is still under way in both directions when the host goes.
            drop(timeout(Duration::from_millis(5), stream.write_all(&[round; 300_000])).await);
        });
        let (mut up, mut down) = (vec![0; 1013], vec![0; 1013]);
        while !used.is_finished() {
            tokio::select! {
                n = wire.read(&mut down) => match n.unwrap() { 0 => break, n => port.write_all(&down[..n]).await.unwrap() },
                n = port.read(&mut up) => match n.unwrap() { 0 => panic!("the guest went"), n => {
                    if wire.write_all(&up[..n]).await.is_err() { break }
                } },
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
        timeout(LONG, used).await.unwrap().unwrap();
        // Torn in the middle of a frame, with something that looks like the start of another behind it.
        port.write_all(b"\xb0chn\x01\x04\0\0\0\0\xff\xe4").await.unwrap();
    }
    drop(port);
    assert_eq!(timeout(LONG, guest).await.unwrap().unwrap().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_byte_lost_on_the_wire_resets_the_session_and_is_never_passed_over() {
    let (host, mut wire) = tokio::io::duplex(64 << 10);
    let (mut port, guest) = tokio::io::duplex(64 << 10);
    tokio::spawn(serve(Listener::new(guest)));
    let connector = Connector::new(host);
    tokio::spawn(async move {
        let (mut up, mut down, mut moved, mut lost) = (vec![0; 4096], vec![0; 4096], 0, false);
        loop {
            tokio::select! {
                n = wire.read(&mut down) => match n { Ok(n) if n > 0 => port.write_all(&down[..n]).await.unwrap(), _ => return },
                n = port.read(&mut up) => match n { Ok(n) if n > 0 => {
                    moved += n;
                    let from = usize::from(!std::mem::replace(&mut lost, moved > 1 << 20) && moved > 1 << 20);
                    if wire.write_all(&up[from..n]).await.is_err() { return }
                }, _ => return },
            }
        }
    });
    let mut stream = connector.open(3).await.unwrap();
    stream.write_u64(4 << 20).await.unwrap();
    let mut got = Vec::new();
    let err = timeout(LONG, stream.read_to_end(&mut got)).await.unwrap().unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::ConnectionReset);
    for (at, byte) in got.iter().enumerate() {
        assert_eq!(*byte, (at % (64 << 10) % 253) as u8);
    }
    assert!(!got.is_empty() && got.len() < 4 << 20);
    assert_eq!(timeout(LONG, echo(&connector, b"after")).await.unwrap().unwrap(), b"after");
}

#[tokio::test]
async fn a_stream_dropped_without_shutdown_does_not_look_complete() {
    let (host, guest) = tokio::io::duplex(64 << 10);
    let mut listener = Listener::new(guest);
    let connector = Connector::new(host);
    let mut stream = connector.open(7).await.unwrap();
    let (port, mut served) = listener.accept().await.unwrap();
    assert_eq!(port, 7);
    served.write_all(b"half").await.unwrap();
    drop(served);
    let mut got = Vec::new();
    assert_eq!(stream.read_to_end(&mut got).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(got, b"half");
}

#[tokio::test]
async fn all_of_it_fails_once_the_port_is_gone() {
    let (host, guest) = tokio::io::duplex(64 << 10);
    let connector = Connector::new(host);
    let waiting = tokio::spawn({
        let connector = connector.clone();
        async move { (connector.ready().await, connector.open(1).await.map(|_| ())) }
    });
    drop(guest);
    let (ready, open) = timeout(LONG, waiting).await.unwrap().unwrap();
    assert_eq!(ready.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(open.unwrap_err().kind(), io::ErrorKind::BrokenPipe);

    let (host, guest) = tokio::io::duplex(64 << 10);
    let mut listener = Listener::new(guest);
    drop(host);
    for _ in 0..2 {
        assert_eq!(
            timeout(LONG, listener.accept()).await.unwrap().unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }
}

#[tokio::test]
async fn a_guest_that_floods_or_stops_reading_costs_no_more_than_its_own_channel() {
    // Reads nothing at all: the host's open waits, and can be given up.
    let (host, _guest) = tokio::io::duplex(1000);
    let connector = Connector::new(host);
    assert!(timeout(Duration::from_millis(50), connector.open(1)).await.is_err());

    // READY for ever, garbage for ever, and never an answer: the host goes on greeting and is there for a real guest.
    let (host, mut guest) = UnixStream::pair().unwrap();
    let connector = Connector::new(host);
    let mut noise = Vec::new();
    for _ in 0..2000 {
        noise.extend_from_slice(&ready_frame());
        noise.extend_from_slice(b"\xb0chn\x01\x04\0\0\0\0\x01\0 nothing of the kind");
    }
    let (mut read, mut write) = guest.split();
    let mut sink = vec![0; 1 << 16];
    let mut heard = 0;
    let drained = async {
        loop {
            heard += read.read(&mut sink).await.unwrap();
        }
    };
    tokio::select! {
        written = write.write_all(&noise) => written.unwrap(),
        () = drained => {}
    }
    // One answer at a time, however many were asked for.
    assert!(heard < 64 * MAX_FRAME, "{heard} bytes of answers");
    tokio::spawn(serve(Listener::new(guest)));
    assert_eq!(timeout(LONG, echo(&connector, b"real")).await.unwrap().unwrap(), b"real");
}

/// A READY frame as it is on the wire.
fn ready_frame() -> Vec<u8> {
    let mut head = b"\xb0chn\x01\x01\0\0".to_vec();
    head.resize(24, 0);
    let sum = crc32fast::hash(&head);
    head.extend_from_slice(&sum.to_be_bytes());
    head
}

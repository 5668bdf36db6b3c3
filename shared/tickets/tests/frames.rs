//! Frames: what is written is read, and whatever else comes is an error.
#![expect(clippy::unwrap_used, reason = "tests")]

use bothy_contract::{Code, Error};
use bothy_tickets::{Frame, FrameReader, FrameWriter, MAX_DATA, MAX_REPORT};
use tokio::io::AsyncReadExt;

async fn written(data: &[u8]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new());
    writer.data(data).await.unwrap();
    writer.end(&42).await.unwrap();
    writer.into_inner()
}

#[tokio::test]
async fn a_stream_reads_back_and_nothing_behind_it_is_touched() {
    let data: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
    let mut stream = written(&data).await;
    stream.extend_from_slice(b"behind");
    let mut reader = FrameReader::new(&stream[..]);
    let mut back = Vec::new();
    reader.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, data);
    assert_eq!(reader.report::<u32>().await.unwrap(), 42);
    assert_eq!(reader.into_inner(), b"behind");
}

#[tokio::test]
async fn frames_are_bounded_and_an_empty_stream_has_only_an_end() {
    let stream = written(&vec![1; MAX_DATA + 1]).await;
    let mut reader = FrameReader::new(&stream[..]);
    assert!(matches!(reader.next().await.unwrap(), Frame::Data(d) if d.len() == MAX_DATA));
    assert!(matches!(reader.next().await.unwrap(), Frame::Data(d) if d.len() == 1));
    assert_eq!(reader.next().await.unwrap(), Frame::End(42.into()));
    assert_eq!(FrameReader::new(&written(b"").await[..]).report::<u32>().await.unwrap(), 42);
}

#[tokio::test]
async fn a_cut_anywhere_is_an_error_and_not_an_end() {
    let stream = written(b"some data").await;
    for cut in 0..stream.len() {
        let mut reader = FrameReader::new(&stream[..cut]);
        let failed = reader.read_to_end(&mut Vec::new()).await.unwrap_err();
        let inner = failed.get_ref().and_then(|e| e.downcast_ref::<Error>()).unwrap();
        assert_eq!(inner.code, Code::Unavailable, "cut at {cut}");
    }
}

#[tokio::test]
async fn the_peers_error_comes_through() {
    let mut writer = FrameWriter::new(Vec::new());
    writer.data(b"half").await.unwrap();
    writer.fail(&Error::new(Code::ResourceExhausted, "disk full")).await.unwrap();
    let stream = writer.into_inner();
    let mut reader = FrameReader::new(&stream[..]);
    assert!(matches!(reader.next().await, Ok(Frame::Data(_))));
    assert_eq!(reader.next().await.unwrap_err(), Error::new(Code::ResourceExhausted, "disk full"));
}

#[tokio::test]
async fn what_is_no_frame_is_refused_before_its_length_is_believed() {
    let too_long = |kind: u8, n: usize| [&[kind][..], &(n as u32).to_be_bytes()].concat();
    for stream in [
        b"Z\0\0\0\x01x".to_vec(),
        too_long(b'D', MAX_DATA + 1),
        too_long(b'E', MAX_REPORT + 1),
        too_long(b'X', usize::MAX),
        too_long(b'D', 0),
        b"E\0\0\0\x01{".to_vec(),
        b"X\0\0\0\x02{}".to_vec(),
    ] {
        let failed = FrameReader::new(&stream[..]).next().await.unwrap_err();
        assert_eq!(failed.code, Code::Internal, "{stream:?}");
    }
    let data_first = written(b"x").await;
    assert!(FrameReader::new(&data_first[..]).report::<u32>().await.is_err());
}

#[tokio::test]
async fn a_dropped_read_loses_nothing() {
    let (mut to, from) = tokio::io::duplex(64);
    let mut reader = FrameReader::new(from);
    let stream = written(b"abc").await;
    let sender = async {
        for byte in &stream {
            tokio::io::AsyncWriteExt::write_all(&mut to, &[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let receiver = async {
        let mut frames = Vec::new();
        while frames.len() < 2 {
            tokio::select! {
                biased;
                frame = reader.next() => frames.push(frame.unwrap()),
                () = tokio::task::yield_now() => {}
            }
        }
        frames
    };
    let ((), frames) = tokio::join!(sender, receiver);
    assert_eq!(frames, [Frame::Data("abc".into()), Frame::End(42.into())]);
}

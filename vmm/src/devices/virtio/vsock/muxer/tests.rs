use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::super::connection::BUF_ALLOC;
use super::super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const CID: u64 = 3;

struct Bed {
    muxer: Muxer,
    directory: PathBuf,
}

impl Bed {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmm-vsock-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        Self { muxer: Muxer::new(CID, &directory, FIRST_HOST_PORT), directory }
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.join(format!("vsock_{port}"))).unwrap()
    }

    fn send(&mut self, key: Key, op: u16, flags: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: key.guest,
            dst_port: key.host,
            len: data.len() as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: 1000,
            fwd_cnt: 0,
        };
        self.muxer.take(&header, data);
    }

    /// Does what the thread does when sockets have something.
    fn turn(&mut self) {
        let watched: Vec<_> = self.muxer.watched(true).iter().map(|(source, ..)| *source).collect();
        for source in watched {
            self.muxer.happened(source, PollFlags::POLLIN | PollFlags::POLLOUT);
        }
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut buffer = vec![0; 4096];
        let (header, len) = self.muxer.next(&mut buffer)?;
        buffer.truncate(len);
        Some((header, buffer))
    }

    fn ops(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.receive().map(|(header, _)| header.op)).collect()
    }

    /// A stream that the guest began, and its other end.
    fn connected(&mut self, key: Key) -> UnixStream {
        let listener = self.listen(key.host);
        self.send(key, op::REQUEST, 0, &[]);
        assert_eq!(self.ops(), [op::RESPONSE]);
        let stream = listener.accept().unwrap().0;
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

const KEY: Key = Key { host: 5000, guest: 1234 };

#[test]
fn lines_of_a_handshake() {
    for (line, port) in [
        ("CONNECT 1024", Some(1024)),
        ("CONNECT 0\r", Some(0)),
        ("CONNECT 4294967296", None),
        ("CONNECT -1", None),
        ("CONNECT", None),
        ("connect 1", None),
        ("", None),
    ] {
        assert_eq!(parse(line.as_bytes()), port, "{line:?}");
    }
}

#[test]
fn the_guest_reaches_a_listener_and_nobody_else() {
    let mut bed = Bed::new();
    bed.send(KEY, op::REQUEST, 0, &[]);
    assert_eq!(bed.ops(), [op::RST], "nobody listens");
    let mut host = bed.connected(KEY);
    bed.send(KEY, op::RW, 0, b"hello");
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 5);
    host.write_all(b"world").unwrap();
    bed.turn();
    let (header, data) = bed.receive().unwrap();
    assert_eq!((header.op, header.fwd_cnt, data.as_slice()), (op::RW, 5, &b"world"[..]));
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
    assert_eq!((header.src_port, header.dst_port), (5000, 1234));
    bed.send(Key { guest: 9, ..KEY }, op::RW, 0, b"x");
    assert_eq!(bed.ops(), [op::RST], "a stream that is not there");
}

#[test]
fn the_host_reaches_the_guest_by_a_line() {
    let mut bed = Bed::new();
    let (mut host, ours) = UnixStream::pair().unwrap();
    bed.muxer.welcome(ours);
    host.write_all(b"CONNE").unwrap();
    bed.turn();
    assert_eq!(bed.receive(), None);
    host.write_all(b"CT 77\nearly").unwrap();
    bed.turn();
    let (request, _) = bed.receive().unwrap();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 77));
    bed.turn();
    assert_eq!(bed.receive(), None, "no data before the guest said yes");
    let key = Key { host: request.src_port, guest: 77 };
    bed.send(key, op::RESPONSE, 0, &[]);
    let mut line = [0; 64];
    let len = host.read(&mut line).unwrap();
    assert_eq!(line[..len], *format!("OK {}\n", key.host).as_bytes());
    bed.turn();
    let (header, data) = bed.receive().unwrap();
    assert_eq!((header.op, data.as_slice(), header.fwd_cnt), (op::RW, &b"early"[..], 0));
}

#[test]
fn a_host_that_says_something_else_is_hung_up_on() {
    for line in [&b"GET / HTTP/1.0\r\n"[..], &[b'x'; 100]] {
        let mut bed = Bed::new();
        let (mut host, ours) = UnixStream::pair().unwrap();
        bed.muxer.welcome(ours);
        host.write_all(line).unwrap();
        bed.turn();
        assert!(bed.muxer.handshakes.is_empty());
        assert_eq!(bed.receive(), None);
    }
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut bed = Bed::new();
    let mut host = bed.connected(KEY);
    host.write_all(&[7; 3000]).unwrap();
    bed.turn();
    assert_eq!(bed.receive().unwrap().1.len(), 1000);
    bed.turn();
    assert_eq!(bed.receive(), None);
    let update = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: KEY.guest,
        dst_port: KEY.host,
        kind: STREAM,
        op: op::CREDIT_UPDATE,
        buf_alloc: 1000,
        fwd_cnt: 600,
        ..Header::default()
    };
    bed.muxer.take(&update, &[]);
    bed.turn();
    assert_eq!(bed.receive().unwrap().1.len(), 600);
    bed.muxer.take(&Header { fwd_cnt: 0xffff_0000, ..update }, &[]);
    bed.turn();
    assert_eq!(bed.receive(), None, "a guest that forwarded what it never got");
}

#[test]
fn a_host_that_does_not_read_costs_no_more_than_the_credit() {
    let mut bed = Bed::new();
    let _host = bed.connected(KEY);
    let mut sent = 0;
    while bed.muxer.connections.contains_key(&KEY) {
        bed.send(KEY, op::RW, 0, &[1; 4096]);
        sent += 4096;
        assert!(sent < 64 << 20);
    }
    assert!(sent > BUF_ALLOC);
    assert_eq!(bed.ops().last(), Some(&op::RST));
}

#[test]
fn the_guest_hears_of_its_credit_before_it_runs_out() {
    let mut bed = Bed::new();
    let mut host = bed.connected(KEY);
    let (mut sent, mut buffer) = (0u32, vec![0; 1 << 20]);
    loop {
        bed.send(KEY, op::RW, 0, &[1; 4096]);
        sent += 4096;
        let _ = host.read(&mut buffer);
        if let Some((header, _)) = bed.receive() {
            assert_eq!((header.op, header.fwd_cnt), (op::CREDIT_UPDATE, sent));
            break;
        }
        assert!(sent < BUF_ALLOC);
    }
    bed.send(KEY, op::CREDIT_REQUEST, 0, &[]);
    assert_eq!(bed.ops(), [op::CREDIT_UPDATE]);
}

#[test]
fn each_direction_closes_by_itself() {
    let mut bed = Bed::new();
    let mut host = bed.connected(KEY);
    bed.send(KEY, op::RW, 0, b"last");
    bed.send(KEY, op::SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last");
    host.write_all(b"answer").unwrap();
    bed.turn();
    assert_eq!(bed.receive().unwrap().1, b"answer");
    drop(host);
    bed.turn();
    let (header, _) = bed.receive().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    bed.muxer.happened(Source::Connection(KEY), PollFlags::POLLHUP);
    let (header, _) = bed.receive().unwrap();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, SHUTDOWN_RECEIVE));
    assert!(bed.muxer.watched(true).is_empty(), "a dead socket is not waited for");
    bed.send(KEY, op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    assert_eq!(bed.ops(), [op::RST]);
    assert!(bed.muxer.connections.is_empty());
}

#[test]
fn streams_take_turns() {
    let mut bed = Bed::new();
    let keys = [1, 2, 3].map(|guest| Key { guest, host: 6000 + guest });
    let mut hosts: Vec<_> = keys.iter().map(|key| bed.connected(*key)).collect();
    for host in &mut hosts {
        host.write_all(&[0; 100]).unwrap();
    }
    bed.turn();
    let mut order: Vec<_> = (0..3).map(|_| bed.receive().unwrap().0.dst_port).collect();
    order.sort_unstable();
    assert_eq!(order, [1, 2, 3]);
}

#[test]
fn there_is_an_end_to_streams_and_refusals() {
    let mut bed = Bed::new();
    let (_host, ours) = UnixStream::pair().unwrap();
    for _ in 0..CONNECTIONS_MAX + 10 {
        bed.muxer.offer(ours.try_clone().unwrap(), 1);
        // One descriptor is enough here.
        if let Some(connection) = bed.muxer.connections.values().next() {
            assert!(connection.has_pending());
        }
        if bed.muxer.connections.len() > 200 {
            break;
        }
    }
    assert!(bed.muxer.connections.len() <= CONNECTIONS_MAX);
    for guest in 0..2 * RESETS_MAX as u32 {
        if bed.muxer.is_full() {
            break;
        }
        bed.send(Key { guest, host: 9 }, op::RW, 0, &[]);
    }
    assert_eq!(bed.muxer.resets.len(), RESETS_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_packet_upsets_it(
        packets in proptest::collection::vec(
            (0u16..9, 0u32..3, any::<u32>(), any::<u32>(), 0u32..4, 0usize..5000, any::<bool>()), 0..100),
    ) {
        let mut bed = Bed::new();
        let _listeners: Vec<_> = (0..2).map(|port| bed.listen(port)).collect();
        for (op, port, buf_alloc, fwd_cnt, flags, len, stream) in packets {
            let header = Header {
                src_cid: CID,
                dst_cid: HOST_CID,
                src_port: port,
                dst_port: port,
                len: len as u32,
                kind: if stream { STREAM } else { 2 },
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            bed.muxer.take(&header, &vec![0; len]);
            bed.turn();
            bed.receive();
            prop_assert!(bed.muxer.connections.len() <= 3);
        }
    }
}

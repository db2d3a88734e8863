//! A pair whose cable is a socket.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::super::super::socket::Socket;
use super::*;

const AT: u64 = TX * QUEUE + DATA;
/// What a driver puts before a packet that is finished.
const FINISHED: [u8; 12] = [0; 12];
const FRAME_MAX: usize = 65535 + 18;

fn plug(bed: &Bed, socket: impl Into<OwnedFd>) {
    bed.shared.ports[0].plug(Some(Arc::new(Cable::Socket(Socket::new(socket.into()).unwrap())))).unwrap();
    bed.shared.set_link(true);
}

fn stream(shape: &Shape) -> (Bed, UnixStream) {
    let (bed, (there, here)) = (Bed::new(shape), UnixStream::pair().unwrap());
    there.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    plug(&bed, here);
    (bed, there)
}

fn datagrams() -> (Bed, UnixDatagram) {
    let (bed, (there, here)) = (Bed::new(&PLAIN), UnixDatagram::pair().unwrap());
    there.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    plug(&bed, here);
    (bed, there)
}

/// Has the guest send a packet, cut in two, and waits until it is taken.
fn send(bed: &Bed, index: u16, head: [u8; 12], frame: &[u8]) {
    let packet = [&head[..], frame].concat();
    bed.ram.write_slice(&packet, GuestAddress(AT)).unwrap();
    bed.offer(TX, index, &[(AT, 5), (AT + 5, packet.len() as u32 - 5)], false);
    bed.wait(|bed| bed.used(TX) == index + 1);
}

/// A buffer of the guest's for a packet.
fn offer(bed: &Bed, index: u16) {
    bed.ram.write_slice(&[0xee; 0x1000], GuestAddress(DATA)).unwrap();
    bed.offer(RX, index, &[(DATA, 7), (DATA + 7, 0xff0)], true);
}

fn received(bed: &Bed, index: u16) -> Vec<u8> {
    bed.wait(|bed| bed.used(RX) == index + 1);
    let packet = bed.data(DATA, bed.used_len(RX, index) as usize);
    assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    packet[12..].to_vec()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

#[test]
fn frames_go_both_ways_behind_their_length_or_as_datagrams() {
    let frame: Vec<u8> = (0..200).collect();
    let (bed, mut there) = stream(&PLAIN);
    for index in 0..3 {
        send(&bed, index, FINISHED, &frame);
        let mut bytes = [0; 204];
        there.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..], framed(&frame));
        offer(&bed, index);
        there.write_all(&framed(&frame)).unwrap();
        assert_eq!(received(&bed, index), frame);
    }
    let (bed, there) = datagrams();
    for index in 0..3 {
        send(&bed, index, FINISHED, &frame);
        let mut bytes = [0; 300];
        let len = there.recv(&mut bytes).unwrap();
        assert_eq!(bytes[..len], frame);
        offer(&bed, index);
        there.send(&frame).unwrap();
        assert_eq!(received(&bed, index), frame);
    }
    let counts = bed.shared.counters.get();
    assert_eq!((counts.tx.packets, counts.tx.bytes, counts.rx.packets, counts.rx.bytes), (3, 600, 3, 600));
}

#[test]
fn a_stream_may_be_cut_anywhere() {
    let (bed, mut there) = stream(&PLAIN);
    let frames: Vec<Vec<u8>> = (0..3u8).map(|index| vec![index; 60 + usize::from(index)]).collect();
    offer(&bed, 0);
    for byte in framed(&frames[0]) {
        there.write_all(&[byte]).unwrap();
        thread::yield_now();
    }
    assert_eq!(received(&bed, 0), frames[0]);
    // Two and a half at once, and the rest; also by another driver than began.
    let mut bed = bed;
    let bytes = [framed(&frames[1]), framed(&frames[2]), framed(&frames[0])].concat();
    let (now, later) = bytes.split_at(bytes.len() - 30);
    offer(&bed, 1);
    there.write_all(now).unwrap();
    assert_eq!(received(&bed, 1), frames[1]);
    offer(&bed, 2);
    assert_eq!(received(&bed, 2), frames[2]);
    bed.move_on();
    offer(&bed, 3);
    there.write_all(later).unwrap();
    assert_eq!(received(&bed, 3), frames[0]);
}

#[test]
fn many_frames_that_come_at_once_all_arrive() {
    let (bed, mut there) = stream(&PLAIN);
    // More than get their turn together, in one read; the guest brings a buffer for each.
    let bytes: Vec<u8> = (0..200u8).flat_map(|index| framed(&[index; 20])).collect();
    there.write_all(&bytes).unwrap();
    for index in 0..200 {
        offer(&bed, index);
        assert_eq!(received(&bed, index), [index as u8; 20]);
    }
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (bed, mut there) = stream(&PLAIN);
    offer(&bed, 0);
    // None, less than a header, more than the guest has room for.
    for len in [0, 13, 5000] {
        there.write_all(&framed(&vec![1; len])).unwrap();
    }
    there.write_all(&framed(&[2; 14])).unwrap();
    assert_eq!(received(&bed, 0), [2; 14]);
    assert_eq!(bed.shared.counters.get().rx.dropped, 3);
    send(&bed, 0, FINISHED, &[3; 13]);
    assert_eq!(bed.shared.counters.get().tx.dropped, 1);

    let (bed, there) = datagrams();
    offer(&bed, 0);
    for len in [0, 13, 5000, FRAME_MAX + 1] {
        there.send(&vec![1; len]).unwrap();
    }
    there.send(&[2; 14]).unwrap();
    assert_eq!(received(&bed, 0), [2; 14]);
    assert_eq!(bed.shared.counters.get().rx.dropped, 4);
    assert!(bed.shared.link());
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for len in [FRAME_MAX as u32 + 1, u32::MAX] {
        let (bed, mut there) = stream(&PLAIN);
        offer(&bed, 0);
        there.write_all(&[&len.to_be_bytes()[..], &[1; 100]].concat()).unwrap();
        bed.wait(|bed| !bed.shared.link());
        // The other side is told.
        assert!(matches!(there.read(&mut [0; 1]), Ok(0) | Err(_)));
        send(&bed, 0, FINISHED, &[1; 60]);
        assert_eq!((bed.shared.counters.get().tx.dropped, bed.used(RX)), (1, 0));
        assert!(bed.shared.ports[0].cable().is_none());
    }
}

#[test]
fn when_the_other_end_is_closed_the_link_is_down_until_there_is_another() {
    for bytes in [&[][..], &[0, 0], &[0, 0, 0, 60, 1, 2, 3]] {
        let (bed, mut there) = stream(&PLAIN);
        offer(&bed, 0);
        there.write_all(bytes).unwrap();
        drop(there);
        bed.wait(|bed| !bed.shared.link());
        let (mut there, here) = UnixStream::pair().unwrap();
        plug(&bed, here);
        there.write_all(&framed(&[5; 60])).unwrap();
        assert_eq!(received(&bed, 0), [5; 60]);
    }
    // Nobody says so of datagrams; the next tells.
    let (bed, there) = datagrams();
    drop(there);
    send(&bed, 0, FINISHED, &[1; 60]);
    bed.wait(|bed| !bed.shared.link());
}

#[test]
fn who_does_not_read_has_the_guest_wait() {
    let (bed, mut there) = stream(&PLAIN);
    let frame = vec![7; 60_000];
    bed.ram.write_slice(&[&FINISHED[..], &frame].concat(), GuestAddress(AT)).unwrap();
    // Its address stays the same, and its rings go round.
    let (mut offered, mut taken) = (0, 0);
    while taken == offered {
        bed.offer(TX, offered, &[(AT, 60_012)], false);
        offered += 1;
        let until = Instant::now() + Duration::from_millis(300);
        while taken != offered && Instant::now() < until {
            thread::yield_now();
            taken = bed.used(TX);
        }
        assert!(offered < 100, "all is taken, and nobody reads");
    }
    // It can be stopped, and goes on with the frame that was cut.
    let mut bed = bed;
    bed.move_on();
    for _ in 0..offered {
        let mut bytes = vec![0; 60_004];
        there.read_exact(&mut bytes).unwrap();
        assert!(bytes == framed(&frame));
    }
    bed.wait(|bed| bed.used(TX) == offered);
    assert_eq!(bed.shared.counters.get().tx.packets, u64::from(offered));
}

#[test]
fn what_the_guest_left_undone_is_done_or_dropped() {
    let (bed, there) = datagrams();
    let frame: Vec<u8> = (0..60).collect();
    let head = |flags, gso, start: u16, offset: u16| {
        let ([s0, s1], [o0, o1]) = (start.to_le_bytes(), offset.to_le_bytes());
        [flags, gso, 0, 0, 0, 0, s0, s1, o0, o1, 0, 0]
    };
    // Large ones, of each kind; and checksums that are outside.
    let heads = [
        head(1, 1, 34, 16),
        head(0, 1, 0, 0),
        head(1, 4, 34, 16),
        head(1, 5, 34, 6),
        head(1, 0x80, 34, 16),
        head(1, 0, 59, 0),
        head(1, 0, 60, 0),
        head(1, 0, u16::MAX, u16::MAX),
    ];
    for (index, head) in (0..).zip(heads) {
        send(&bed, index, head, &frame);
    }
    let counters = || bed.shared.counters.get().tx;
    assert_eq!((counters().dropped, counters().packets), (heads.len() as u64, 0));
    send(&bed, heads.len() as u16, head(1, 0, 34, 16), &frame);
    let mut bytes = [0; 100];
    let len = there.recv(&mut bytes).unwrap();
    assert_eq!((len, &bytes[..50], &bytes[52..60]), (60, &frame[..50], &frame[52..]));
    let sum: u32 = frame[34..].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    assert_eq!(bytes[50..52], (!sum as u16).to_be_bytes());
    // What needs nothing is left as it is.
    send(&bed, heads.len() as u16 + 1, head(0, 0, 34, 16), &frame);
    let len = there.recv(&mut bytes).unwrap();
    assert_eq!(bytes[..len], frame);
}

#[test]
fn what_is_no_end_of_a_network_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let there = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let alone = UnixDatagram::unbound().unwrap();
    for fd in [OwnedFd::from(file), tcp.into(), there.into(), alone.into()] {
        let error = Socket::new(fd).unwrap_err().to_string();
        assert!(error.contains("no connected unix socket"), "{error}");
    }
}

use super::*;

const ASKER: Asker = Asker { mac: Mac([2, 0, 0, 0, 0, 9]), xid: 0x0102_0304 };
const OWN: [u8; 4] = [10, 0, 2, 15];
const OFFER: &[u8] = &[KIND, 1, 2];
const FROM: &[u8] = &[SERVER_ID, 4, 10, 0, 2, 2];

/// What a server sends.
fn answer(address: [u8; 4], options: &[&[u8]]) -> Vec<u8> {
    let mut message = vec![0; FIXED];
    message[..3].copy_from_slice(&[2, 1, 6]);
    message[XID..XID + 4].copy_from_slice(&ASKER.xid.to_be_bytes());
    message[YIADDR..YIADDR + 4].copy_from_slice(&address);
    message[CHADDR..CHADDR + 6].copy_from_slice(&ASKER.mac.0);
    message[FIXED - 4..].copy_from_slice(&COOKIE);
    message.extend(options.concat());
    let mut packet = packet([10, 0, 2, 2].into(), address.into(), &message);
    packet[20..24].rotate_left(2);
    packet
}

fn offered(options: &[&[u8]]) -> Option<Lease> {
    match ASKER.hear(&answer(OWN, &[&[OFFER, FROM], options].concat()))? {
        Answer::Offer(lease) => Some(lease),
        other => panic!("{other:?}"),
    }
}

#[test]
fn questions_are_whole_datagrams() {
    let request = Question::Request { address: OWN.into(), server: [10, 0, 2, 2].into() };
    for (question, kind, own) in
        [(Question::Discover, 1, [0; 4]), (request, 3, [0; 4]), (Question::Renew(OWN.into()), 3, OWN)]
    {
        let mut packet = ASKER.ask(question, None);
        assert_eq!(sum(&[&packet[..IP]]), u16::MAX);
        assert_eq!((&packet[12..16], &packet[16..20]), (&own[..], &[255; 4][..]));
        assert_eq!(packet.len(), usize::from(u16::from_be_bytes([packet[2], packet[3]])));
        assert!(packet.len() >= IP + UDP + SMALLEST);
        // A server's eyes: the same, with ports exchanged.
        packet[20..24].rotate_left(2);
        let message = payload(&packet).unwrap();
        assert_eq!((&message[CIADDR..CIADDR + 4], message[10]), (&own[..], if own == OWN { 0 } else { 128 }));
        let options = Options::of(message);
        assert_eq!(options.kind, Some(kind));
        assert_eq!(options.server.is_some(), question == request);
    }
    let to_one = ASKER.ask(Question::Renew(OWN.into()), Some([10, 0, 2, 2].into()));
    assert_eq!(to_one[16..20], [10, 0, 2, 2]);
}

#[test]
fn what_a_server_says_is_understood() {
    let options: &[&[u8]] = &[
        &[PAD, SUBNET_MASK, 4, 255, 255, 255, 0, ROUTERS, 8, 10, 0, 2, 1, 10, 0, 2, 3],
        &[MTU, 2, 0xff, 0xf0, LEASE, 4, 0, 0, 0x0e, 0x10, 200, 3, 1, 2, 3, END, 4, 4],
    ];
    let lease = offered(options).unwrap();
    let seconds = Duration::from_secs;
    let times = Times { renew: seconds(1800), rebind: seconds(3150), end: seconds(3600) };
    let expected = Lease {
        address: OWN.into(),
        length: 24,
        router: Some([10, 0, 2, 1].into()),
        mtu: Some(65520),
        server: [10, 0, 2, 2].into(),
        times: Some(times),
    };
    assert_eq!(lease, expected);
    let ack = ASKER.hear(&answer(OWN, &[&[KIND, 1, 5], FROM, options[0], options[1]]));
    assert_eq!(ack, Some(Answer::Ack(expected)));
    assert_eq!(ASKER.hear(&answer([0; 4], &[&[KIND, 1, 6]])), Some(Answer::Nak));
    // Where there is no room for options, names go.
    let mut packet = answer(OWN, &[OFFER, FROM, &[OVERLOAD, 1, 3, END]]);
    for (at, code) in [(FILE.start, SUBNET_MASK), (SNAME.start, ROUTERS)] {
        packet[IP + UDP + at..][..6].copy_from_slice(&[code, 4, 255, 255, 128, 0]);
    }
    packet[IP + UDP + SNAME.start + 2..][..4].copy_from_slice(&[10, 0, 2, 7]);
    packet[26..28].fill(0);
    let Some(Answer::Offer(lease)) = ASKER.hear(&packet) else { panic!() };
    assert_eq!((lease.length, lease.router), (17, Some([10, 0, 2, 7].into())));
}

#[test]
fn a_lease_is_one_that_an_interface_can_have() {
    let mask = |bits: [u8; 4]| [SUBNET_MASK, 4, bits[0], bits[1], bits[2], bits[3]];
    for (bits, length) in [
        ([255, 255, 255, 255], Some(32)),
        ([128, 0, 0, 0], Some(1)),
        ([0, 0, 0, 0], None),
        ([255, 0, 255, 0], None),
        ([0, 0, 0, 1], None),
    ] {
        assert_eq!(offered(&[&mask(bits)]).map(|lease| lease.length), length, "{bits:?}");
    }
    for address in [[0; 4], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [0, 0, 0, 5], [240, 0, 0, 1]] {
        assert_eq!(ASKER.hear(&answer(address, &[OFFER, FROM])), None, "{address:?}");
        let router = [&[ROUTERS, 4][..], &address].concat();
        assert_eq!(offered(&[&router]).unwrap().router, None, "{address:?}");
    }
    // Its own address is nobody's gateway; too small an MTU is none.
    let lease = offered(&[&[ROUTERS, 4, 10, 0, 2, 15, MTU, 2, 0, 67]]).unwrap();
    assert_eq!((lease.router, lease.mtu, lease.length), (None, None, 8));
    // Of whom it is has to be said.
    assert_eq!(ASKER.hear(&answer(OWN, &[OFFER])), None);
}

#[test]
fn times_are_in_order_and_not_too_short() {
    let seconds = |code: u8, number: u32| [&[code, 4][..], &number.to_be_bytes()].concat();
    for (lease, renew, rebind, expected) in [
        (Some(3600), None, None, Some([1800, 3150, 3600])),
        (Some(3600), Some(100), Some(200), Some([100, 200, 3600])),
        (Some(3600), Some(200), Some(100), Some([100, 100, 3600])),
        (Some(3600), Some(9999), Some(9999), Some([1800, 3150, 3600])),
        (Some(3600), Some(0), Some(0), Some([1800, 3150, 3600])),
        (Some(0), None, None, Some([10, 17, 20])),
        (Some(1), Some(0), Some(1), Some([10, 17, 20])),
        (None, None, None, Some([10, 17, 20])),
        (Some(u32::MAX), Some(1), Some(1), None),
    ] {
        let options = [(LEASE, lease), (T1, renew), (T2, rebind)];
        let options: Vec<_> =
            options.iter().filter_map(|(code, number)| Some(seconds(*code, (*number)?))).collect();
        let options: Vec<_> = options.iter().map(Vec::as_slice).collect();
        let times = offered(&options).unwrap().times;
        let found = times.map(|times| [times.renew, times.rebind, times.end].map(|time| time.as_secs()));
        assert_eq!(found, expected, "{lease:?} {renew:?} {rebind:?}");
    }
}

#[test]
fn what_is_no_answer_to_this_one_is_not_heard() {
    let good = answer(OWN, &[OFFER, FROM]);
    assert!(ASKER.hear(&good).is_some());
    assert!(Asker { xid: 1, ..ASKER }.hear(&good).is_none());
    assert!(Asker { mac: Mac([2; 6]), ..ASKER }.hear(&good).is_none());
    for (at, byte) in [
        (0, 0x65),
        (0, 0x44),
        (0, 0x4f),
        (2, 0xff),
        (3, 10),
        (6, 0x20),
        (7, 1),
        (9, 6),
        (21, 68),
        (23, 67),
        (24, 0xff),
        (25, 3),
        (27, 0x33),
        (28, 1),
        (30, 5),
        (IP + UDP + FIXED - 1, 1),
        (IP + UDP + FIXED + 2, 9),
    ] {
        let mut packet = good.clone();
        packet[at] ^= byte;
        // The sum is not what refuses the others.
        if at != 27 {
            packet[26..28].fill(0);
        }
        assert!(ASKER.hear(&packet).is_none(), "{at}");
    }
}

#[test]
fn cut_anywhere_and_with_any_byte_it_is_read_within_its_bounds() {
    let good =
        answer(OWN, &[OFFER, FROM, &[OVERLOAD, 1, 3, SUBNET_MASK, 4, 255, 255, 255, 0, ROUTERS, 200, 1]]);
    for len in 0..good.len() {
        let _ = ASKER.hear(&good[..len]);
    }
    let mut state = 1u32;
    for _ in 0..100_000 {
        let mut packet = good.clone();
        packet[26..28].fill(0);
        for _ in 0..4 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = (state >> 8) as usize % packet.len();
            packet[at] = (state >> 24) as u8;
        }
        let _ = ASKER.hear(&packet);
    }
}

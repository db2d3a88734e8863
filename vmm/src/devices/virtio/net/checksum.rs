//! Internet checksums (RFC 1071) that a driver has left to the device: the field has the sum of the pseudo header, and
//! what has to be added is all that follows.

/// Puts the checksum of all from `start` on into the field `offset` bytes behind. False, and nothing is done, when that
/// is not within the frame.
pub fn complete(frame: &mut [u8], start: u16, offset: u16) -> bool {
    let Some(covered) = frame.get_mut(usize::from(start)..) else { return false };
    let sum = sum(covered);
    let Some(field) = covered.get_mut(usize::from(offset)..).and_then(|rest| rest.first_chunk_mut::<2>())
    else {
        return false;
    };
    // To a datagram's receiver, zero would say that there is none. For all else both say the same.
    *field = if sum == 0xffff { sum } else { !sum }.to_be_bytes();
    true
}

fn sum(bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks::<2>();
    // No frame has so many words that it could overflow.
    let words: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    let mut sum = words + rest.first().map_or(0, |last| u64::from(*last) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// Bytes of Ethernet's header.
    const ETHERNET: usize = 14;

    /// A packet as a driver leaves it, where its checksum starts, and what has to be summed up to verify it.
    fn packet(addresses: [&str; 2], protocol: u8, field: u16, payload: &[u8]) -> (Vec<u8>, usize, Vec<u8>) {
        let mut pseudo = Vec::new();
        for address in addresses {
            match address.parse().unwrap() {
                IpAddr::V4(address) => pseudo.extend(address.octets()),
                IpAddr::V6(address) => pseudo.extend(address.octets()),
            }
        }
        let header = if pseudo.len() == 8 { 20 } else { 40 };
        let transport = [&vec![7; usize::from(field)][..], &[0, 0], payload].concat();
        pseudo.extend([0, protocol]);
        pseudo.extend((transport.len() as u16).to_be_bytes());
        let start = ETHERNET + header;
        let mut frame = [vec![0xee; start], transport].concat();
        let at = start + usize::from(field);
        frame[at..at + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
        (frame, start, pseudo)
    }

    #[test]
    fn tcp_and_udp_of_both_versions_are_right_afterwards() {
        let (v4, v6) = (["10.0.2.15", "192.0.2.1"], ["fd00::15", "2001:db8::1"]);
        for (protocol, field) in [(6, 16), (17, 6)] {
            for addresses in [v4, v6] {
                for len in [0, 1, 2, 11, 1000, 65_000] {
                    let payload: Vec<u8> = (0..len).map(|index: u32| (index * 31) as u8).collect();
                    let (mut frame, start, pseudo) = packet(addresses, protocol, field, &payload);
                    assert!(complete(&mut frame, start as u16, field));
                    // Whoever receives it sums up all, and has no bit unset.
                    assert_eq!(sum(&[&pseudo[..], &frame[start..]].concat()), 0xffff, "{addresses:?} {len}");
                    assert_eq!(frame[..start], vec![0xee; start]);
                }
            }
        }
    }

    #[test]
    fn a_known_datagram_has_its_known_checksum() {
        let (mut frame, start, _) = packet(["152.1.51.27", "152.14.94.75"], 17, 6, &[0x62, 0x62]);
        frame[start..start + 6].copy_from_slice(&[0xa0, 0x8f, 0x26, 0x94, 0, 10]);
        assert!(complete(&mut frame, start as u16, 6));
        assert_eq!(frame[start + 6..start + 8], [0x14, 0xde]);
    }

    #[test]
    fn a_checksum_is_never_zero() {
        let mut frame = [0xff, 0xff, 0, 0];
        assert!(complete(&mut frame, 0, 2));
        assert_eq!(frame, [0xff; 4]);
    }

    #[test]
    fn what_is_not_within_the_frame_is_left_alone() {
        for (start, offset) in
            [(21, 0), (20, 0), (19, 0), (0, 19), (0, 20), (10, 9), (u16::MAX, 2), (2, u16::MAX)]
        {
            let mut frame = [9; 20];
            assert!(!complete(&mut frame, start, offset), "{start} {offset}");
            assert_eq!(frame, [9; 20]);
        }
        assert!(!complete(&mut [], 0, 0));
    }
}

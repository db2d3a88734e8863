//! `struct virtio_vsock_hdr`, section 5.10.6.

/// The header in front of every packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// Its size.
pub const HEADER: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;

/// Operations.
pub mod op {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of a shutdown: its sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a shutdown: its sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

impl Header {
    /// From guest memory's bytes.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Self {
            src_cid: number(0, 8),
            dst_cid: number(8, 8),
            src_port: number(16, 4) as u32,
            dst_port: number(20, 4) as u32,
            len: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buf_alloc: number(36, 4) as u32,
            fwd_cnt: number(40, 4) as u32,
        }
    }

    /// As guest memory has it.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0403_0201,
            dst_port: 1024,
            len: 7,
            kind: STREAM,
            op: op::RW,
            flags: 2,
            buf_alloc: 0x4_0000,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!((bytes[0], bytes[8], &bytes[16..20]), (3, 2, &[1, 2, 3, 4][..]));
        assert_eq!((bytes[24], bytes[28], bytes[30], bytes[32], bytes[40]), (7, 1, 5, 2, 9));
        assert_eq!(bytes[36..40], [0, 0, 4, 0]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}

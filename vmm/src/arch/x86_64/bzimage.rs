//! Taking the kernel proper out of a bzImage (Linux `Documentation/arch/x86/boot.rst`), so that it
//! starts at its PVH entry instead of decompressing itself in the guest.

use std::io::Read;

/// The header is in the first sectors of the file.
const SETUP_SECTS: usize = 0x1f1;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The protocol version that brought the payload's place.
const VERSION_WITH_PAYLOAD: u16 = 0x0208;
const SECTOR: usize = 512;

/// Larger kernels are not; a decompressor that is asked for more stops.
const KERNEL_MAX: u64 = 1 << 30;

/// How the payload is compressed, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Zstd,
    Gzip,
    Lz4,
    None,
}

fn compression(payload: &[u8]) -> Result<Compression, String> {
    const MAGICS: &[(&[u8], Result<Compression, &str>)] = &[
        (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Compression::Zstd)),
        (&[0x1f, 0x8b], Ok(Compression::Gzip)),
        (&[0x02, 0x21, 0x4c, 0x18], Ok(Compression::Lz4)),
        (b"\x7fELF", Ok(Compression::None)),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Err("xz")),
        (b"BZh", Err("bzip2")),
        (&[0x5d, 0, 0], Err("lzma")),
        (&[0x89, b'L', b'Z', b'O'], Err("lzo")),
    ];
    let known = MAGICS.iter().find(|(magic, _)| payload.starts_with(magic));
    match known {
        Some((_, Ok(compression))) => Ok(*compression),
        Some((_, Err(name))) => Err(format!(
            "its payload is compressed by {name}, which is not supported: extract the vmlinux and give that"
        )),
        None => Err("its payload is compressed in an unknown way".into()),
    }
}

/// The ELF kernel inside of a bzImage, or what is wrong with it.
pub fn extract(image: &[u8]) -> Result<Vec<u8>, String> {
    let payload = payload(image)?;
    let mut kernel = Vec::new();
    match compression(payload)? {
        Compression::None => kernel.extend_from_slice(payload),
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| format!("its payload is no zstd: {error}"))?;
            read(decoder, &mut kernel)?;
        }
        Compression::Gzip => read(flate2::read::GzDecoder::new(payload), &mut kernel)?,
        Compression::Lz4 => lz4_legacy(&payload[4..], &mut kernel)?,
    }
    Ok(kernel)
}

fn payload(image: &[u8]) -> Result<&[u8], String> {
    let short = || "the setup header is not all there".to_owned();
    let number = |at: usize, len: usize| {
        let bytes = image.get(at..at + len).ok_or_else(short)?;
        Ok::<_, String>(bytes.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let version = number(VERSION, 2)? as u16;
    if version < VERSION_WITH_PAYLOAD {
        return Err(format!("boot protocol {version:#06x} does not say where the payload is"));
    }
    let sectors = match number(SETUP_SECTS, 1)? {
        0 => 4,
        sectors => sectors,
    };
    let start = (sectors + 1) * SECTOR + number(PAYLOAD_OFFSET, 4)?;
    let end = start + number(PAYLOAD_LENGTH, 4)?;
    image
        .get(start..end)
        .ok_or_else(|| format!("the payload ends at {end:#x}, the file at {:#x}", image.len()))
}

fn read(decoder: impl Read, kernel: &mut Vec<u8>) -> Result<(), String> {
    let read = decoder.take(KERNEL_MAX + 1).read_to_end(kernel);
    match read {
        Ok(len) if len as u64 > KERNEL_MAX => Err("its payload is larger than any kernel".into()),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("its payload does not decompress: {error}")),
    }
}

/// LZ4's old frame: blocks of at most 8 MiB, each behind its compressed length. The last four bytes
/// of the payload are the kernel's length, which is no block.
fn lz4_legacy(mut payload: &[u8], kernel: &mut Vec<u8>) -> Result<(), String> {
    const BLOCK: usize = 8 << 20;
    while let Some((len, rest)) = payload.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let Some((block, rest)) = rest.split_at_checked(len) else { break };
        let bytes = lz4_flex::block::decompress(block, BLOCK)
            .map_err(|error| format!("its payload does not decompress: {error}"))?;
        kernel.extend_from_slice(&bytes);
        if kernel.len() as u64 > KERNEL_MAX {
            return Err("its payload is larger than any kernel".into());
        }
        payload = rest;
    }
    if kernel.is_empty() { Err("its payload is empty".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[VERSION..VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"trailer");
        image
    }

    fn sample() -> Vec<u8> {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.extend((0u32..5000).flat_map(|n| (n / 7).to_le_bytes()));
        kernel
    }

    #[test]
    fn every_supported_compression_comes_out_as_it_went_in() {
        let kernel = sample();
        let zstd =
            ruzstd::encoding::compress_to_vec(kernel.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&kernel).unwrap();
        let gzip = gzip.finish().unwrap();
        let block = lz4_flex::block::compress(&kernel);
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(&block);
        for (name, compressed) in [("zstd", zstd), ("gzip", gzip), ("lz4", lz4), ("none", kernel.clone())] {
            // What the kernel's build appends, except to a payload that is not compressed.
            let mut payload = compressed;
            if name != "none" {
                payload.extend((kernel.len() as u32).to_le_bytes());
            }
            assert!(extract(&image(&payload)) == Ok(kernel.clone()), "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut old = image(b"\x7fELF");
        old[VERSION] = 7;
        for (image, word) in [
            (vec![], "header"),
            (vec![0; 600], "protocol"),
            (old, "protocol"),
            (image(b"\x7fELF")[..1040].to_vec(), "ends"),
            (image(b"what is this"), "unknown"),
            (image(&[0xfd, b'7', b'z', b'X', b'Z', 0, 0]), "xz"),
            (image(&[0x28, 0xb5, 0x2f, 0xfd, 0xff]), "payload"),
            (image(&[0x1f, 0x8b, 8, 0]), "decompress"),
            (image(&[0x02, 0x21, 0x4c, 0x18]), "empty"),
        ] {
            let error = extract(&image).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_payload_upsets_it(
            magic in prop_oneof![
                Just(vec![0x28, 0xb5, 0x2f, 0xfd]), Just(vec![0x1f, 0x8b]), Just(vec![0x02, 0x21, 0x4c, 0x18])],
            rest in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = extract(&image(&[magic, rest].concat()));
        }
    }
}

//! Archives one behind the other, which a kernel takes for one initrd.

use std::fs;
use std::io;
use std::path::Path;

/// An archive begins at a multiple of so many bytes.
const ALIGNMENT: usize = 4;

/// The archives in these files, in a row.
pub fn in_a_row<P: AsRef<Path>>(files: impl IntoIterator<Item = P>) -> io::Result<Vec<u8>> {
    let mut row = Vec::new();
    for file in files {
        let file = file.as_ref();
        let archive = fs::read(file)
            .map_err(|error| io::Error::new(error.kind(), format!("reading {}: {error}", file.display())))?;
        row.extend(archive);
        row.resize(row.len().next_multiple_of(ALIGNMENT), 0);
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_begins_where_a_kernel_looks_for_it() {
        let dir = std::env::temp_dir().join(format!("archives-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in [("a", "12345"), ("b", "1234")] {
            fs::write(dir.join(name), text).unwrap();
        }
        assert_eq!(in_a_row([dir.join("a"), dir.join("b")]).unwrap(), b"12345\0\0\x001234");
        let missing = in_a_row([dir.join("none")]).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
        fs::remove_dir_all(&dir).unwrap();
    }
}

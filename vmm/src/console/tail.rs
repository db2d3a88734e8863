//! A file that keeps the last part of what is written to it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A log that cannot fill a disk: when the file is full, its older half goes, up to the end of a line.
#[derive(Debug)]
pub struct Tail {
    file: File,
    len: usize,
    max: usize,
}

impl Tail {
    /// An empty file at `path`, of at most `max` bytes.
    pub fn create(path: &Path, max: usize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Self { file, len: 0, max })
    }

    /// Whatever happens on the way, the file stays within its bounds.
    fn halve(&mut self) -> io::Result<()> {
        let keep = self.len.min(self.max / 2);
        let mut newer = vec![0; keep];
        let read = self.file.read_exact_at(&mut newer, (self.len - keep) as u64);
        self.file.set_len(0)?;
        self.len = 0;
        read?;
        let whole = newer.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        self.append(&newer[whole..])
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.len as u64)?;
        self.len += bytes.len();
        Ok(())
    }
}

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(self.max / 2)];
        if self.len + bytes.len() > self.max {
            self.halve()?;
        }
        self.append(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_half_goes_by_whole_lines() {
        let path = std::env::temp_dir().join(format!("vmm-tail-{}", std::process::id()));
        let mut tail = Tail::create(&path, 1000).unwrap();
        let read = || std::fs::read_to_string(&path).unwrap();
        tail.write_all(b"first\n").unwrap();
        assert_eq!(read(), "first\n");
        for number in 0..1000 {
            writeln!(tail, "{number:09}").unwrap();
            assert!(read().len() <= 1000);
        }
        assert!(read().len() >= 400 && read().ends_with("000000999\n"), "{}", read());
        assert!(read().lines().all(|line| line.len() == 9), "{}", read());
        // More than fits at once, and no line in it.
        tail.write_all(&[b'x'; 5000]).unwrap();
        assert!(read().len() <= 1000 && read().ends_with("xxx"));
        std::fs::remove_file(&path).unwrap();
    }
}

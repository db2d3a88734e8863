//! The words a case is written in: names, texts, flags, modes.

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

/// Why a step has no plain outcome.
#[derive(Debug)]
pub enum Fault {
    /// The call failed: an outcome like any other.
    Call(Errno),
    /// The same by name: in another process, or because an earlier step failed.
    Named(String),
    /// The case is written wrong, or the checker itself failed: nothing it tells can be trusted.
    Case(String),
}

/// What a step tells when its calls worked; nothing at all stands for "ok".
pub type Told = Result<String, Fault>;

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Call(errno)
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(code) => Self::Call(Errno::from_raw(code)),
            None => Self::Case(error.to_string()),
        }
    }
}

/// The outcome of a call that has nothing to tell.
pub fn ok<T>(result: nix::Result<T>) -> Told {
    result?;
    Ok(String::new())
}

/// The outcome of a call of the C library: -1 says that errno has the reason.
pub fn check(result: libc::c_int) -> Told {
    ok(Errno::result(result))
}

/// A complaint about the case itself.
pub fn wrong<T>(what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Case(what.into()))
}

/// Writes out repetitions: `n{255}` is 255 times `n`, `(d/){9}` nine times `d/`.
pub fn expand(word: &str) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((count, tail)) = after.split_once('}') else { break };
        let Ok(count) = count.parse() else { break };
        let unit_at = match before.strip_suffix(')') {
            Some(grouped) => grouped.rfind('(').unwrap_or(0),
            None => before.char_indices().last().map_or(0, |(at, _)| at),
        };
        let (kept, unit) = before.split_at(unit_at);
        out.push_str(kept);
        out.push_str(&unit.trim_matches(['(', ')']).repeat(count));
        rest = tail;
    }
    out + rest
}

/// Bytes as a word: what is not a letter is escaped, and what repeats is counted as [`expand`] reads it.
pub fn shown(bytes: &[u8]) -> String {
    let mut out = String::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        let unit = match run[0] {
            0 => "\\0".to_owned(),
            byte @ b'!'..=b'~' => char::from(byte).to_string(),
            byte => format!("\\x{byte:02x}"),
        };
        let many = if run.len() > 4 { format!("{unit}{{{}}}", run.len()) } else { unit.repeat(run.len()) };
        out.push_str(&many);
    }
    if out.is_empty() { "nothing".to_owned() } else { out }
}

pub fn number<T: std::str::FromStr>(word: &str) -> Result<T, Fault> {
    word.parse().or_else(|_| wrong(format!("{word} is no number")))
}

/// An offset or size: a number, with K, M, G or T behind it.
pub fn size(word: &str) -> Result<i64, Fault> {
    let shift = match word.as_bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let digits: i64 = number(word.trim_end_matches(['K', 'M', 'G', 'T']))?;
    Ok(digits << shift)
}

pub fn mode(word: &str) -> Result<Mode, Fault> {
    match u32::from_str_radix(word, 8) {
        Ok(bits) => Ok(Mode::from_bits_retain(bits)),
        Err(_) => wrong(format!("{word} is no mode")),
    }
}

/// `1000:1000`; `-` leaves one as it is.
pub fn owner(word: &str) -> Result<(Option<u32>, Option<u32>), Fault> {
    let Some((user, group)) = word.split_once(':') else { return wrong(format!("{word} is no owner")) };
    let id = |word: &str| if word == "-" { Ok(None) } else { number(word).map(Some) };
    Ok((id(user)?, id(group)?))
}

/// `rw,creat,excl`.
pub fn flags(word: &str) -> Result<OFlag, Fault> {
    word.split(',').try_fold(OFlag::O_CLOEXEC, |flags, name| {
        Ok(flags
            | match name {
                "r" => OFlag::O_RDONLY,
                "w" => OFlag::O_WRONLY,
                "rw" => OFlag::O_RDWR,
                "creat" => OFlag::O_CREAT,
                "excl" => OFlag::O_EXCL,
                "trunc" => OFlag::O_TRUNC,
                "append" => OFlag::O_APPEND,
                "nofollow" => OFlag::O_NOFOLLOW,
                "directory" => OFlag::O_DIRECTORY,
                "direct" => OFlag::O_DIRECT,
                "tmpfile" => OFlag::O_TMPFILE,
                "path" => OFlag::O_PATH,
                "sync" => OFlag::O_SYNC,
                "dsync" => OFlag::O_DSYNC,
                "noatime" => OFlag::O_NOATIME,
                "nonblock" => OFlag::O_NONBLOCK,
                _ => return wrong(format!("{name} is no flag of open")),
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_written_out() {
        for (word, expected) in [
            ("a", "a"),
            ("a{3}", "aaa"),
            ("xa{3}y", "xaaay"),
            ("(d/){2}f", "d/d/f"),
            ("x(ab){2}c{2}", "xababcc"),
            ("{", "{"),
            ("a{b}", "a{b}"),
        ] {
            assert_eq!(expand(word), expected);
        }
    }

    #[test]
    fn bytes_are_told_in_a_word() {
        for (bytes, expected) in [
            (&b"abc"[..], "abc"),
            (b"", "nothing"),
            (&[0; 4096], "\\0{4096}"),
            (b"a b\n", "a\\x20b\\x0a"),
            (b"aaaaab", "a{5}b"),
        ] {
            assert_eq!(shown(bytes), expected);
        }
    }
}

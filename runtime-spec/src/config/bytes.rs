//! Amounts of memory as people write them: `512MiB`, `2Gi`, or plain bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An amount of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const UNITS: &[(&str, u32)] = &[("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('B').unwrap_or(text);
        let unit = UNITS.iter().find_map(|(unit, shift)| Some((number.strip_suffix(unit)?, *shift)));
        let (number, shift) = unit.unwrap_or((text, 0));
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let amount = digits.then(|| number.parse::<u64>().ok()).flatten();
        amount.and_then(|amount| amount.checked_mul(1 << shift)).map(Bytes).ok_or_else(|| {
            format!("{text:?} is not an amount of memory: write 512MiB, 2GiB or a number of bytes")
        })
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |shift: u32| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match UNITS.iter().find(|(_, shift)| exact(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}B", self.0 >> shift),
            None => self.0.fmt(f),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "an amount of memory, like \"512MiB\"")]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(amount) => Ok(Bytes(amount)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        for (text, amount, shown) in [
            ("0", Some(0), "0"),
            ("1000", Some(1000), "1000"),
            ("1024", Some(1024), "1KiB"),
            ("512MiB", Some(512 << 20), "512MiB"),
            ("2Gi", Some(2 << 30), "2GiB"),
            ("1TiB", Some(1 << 40), "1TiB"),
            ("", None, ""),
            ("MiB", None, ""),
            ("-1", None, ""),
            ("+1", None, ""),
            ("1.5GiB", None, ""),
            ("512MB", None, ""),
            ("100B", None, ""),
            ("99999999999999999TiB", None, ""),
        ] {
            let parsed: Option<Bytes> = text.parse().ok();
            assert_eq!(parsed.map(|bytes| bytes.0), amount, "{text}");
            if let Some(bytes) = parsed {
                assert_eq!(bytes.to_string(), shown);
            }
        }
    }
}

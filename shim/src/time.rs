//! Times: nanoseconds since the epoch here, timestamps on the wire, RFC 3339 in logs.

use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// As the wire has it; 0 is no time.
pub fn timestamp(nanoseconds: i64) -> MessageField<Timestamp> {
    if nanoseconds == 0 { MessageField::none() } else { MessageField::some(exact(nanoseconds)) }
}

/// As the wire has it.
pub fn exact(nanoseconds: i64) -> Timestamp {
    const SECOND: i64 = 1_000_000_000;
    Timestamp {
        seconds: nanoseconds.div_euclid(SECOND),
        nanos: nanoseconds.rem_euclid(SECOND) as i32,
        ..Timestamp::default()
    }
}

/// `2006-01-02T15:04:05.000000000Z`
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

/// The date so many days after 1970-01-01, counted in years that begin in March, so that leap days are last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_675, (2023, 11, 14)),
            (20_088, (2024, 12, 31)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }

    #[test]
    fn timestamps() {
        assert!(timestamp(0).is_none());
        let stamp = exact(1_500_000_001);
        assert_eq!((stamp.seconds, stamp.nanos), (1, 500_000_001));
    }
}

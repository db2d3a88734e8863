//! How the state of a device becomes bytes and comes back: postcard, with a bound.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::StateError;

/// No device has more to say. A share with a million files known to its guest stays below half of it, and as much may
/// be the content of files that were removed while open.
pub const MAX: usize = 128 << 20;

/// The bytes of a state.
pub fn encode<T: Serialize>(state: &T) -> Result<Vec<u8>, StateError> {
    let bytes =
        postcard::to_stdvec(state).map_err(|error| StateError(format!("it cannot be written: {error}")))?;
    bounded(&bytes)?;
    Ok(bytes)
}

/// The state that the bytes are, all of them.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StateError> {
    bounded(bytes)?;
    match postcard::take_from_bytes(bytes) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(StateError(format!("{} bytes too many were saved", rest.len()))),
        Err(error) => Err(StateError(format!("what was saved cannot be read: {error}"))),
    }
}

fn bounded(bytes: &[u8]) -> Result<(), StateError> {
    match bytes.len() {
        0..=MAX => Ok(()),
        len => Err(StateError(format!("its state has {len} bytes, of which {MAX} are the most"))),
    }
}

/// A list of no more than `MOST`, for fields: `#[serde(deserialize_with = "at_most::<MOST, _, _>")]`. An element can
/// take many times the memory of its bytes, so those too many are not read.
#[cfg_attr(not(all(target_os = "linux", feature = "fs")), allow(dead_code))]
pub fn at_most<'de, const MOST: usize, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct List<const MOST: usize, T>(PhantomData<T>);

    impl<'de, const MOST: usize, T: Deserialize<'de>> Visitor<'de> for List<MOST, T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MOST} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = seq.next_element()? {
                if list.len() == MOST {
                    return Err(Error::invalid_length(MOST + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(List::<MOST, T>(PhantomData))
}

/// Refuses what differs between a device that was saved and the one that is to go on, and says what it is.
pub fn same<T: PartialEq + std::fmt::Display>(what: &str, saved: &T, here: &T) -> Result<(), StateError> {
    if saved == here {
        return Ok(());
    }
    Err(StateError(format!("its {what} was {saved} and is {here} here; give it what it had")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Sample = (u64, Option<String>, Vec<u16>);

    #[test]
    fn all_bytes_count_and_too_many_are_refused() {
        let sample: Sample = (7, Some("x".into()), vec![1, 2]);
        let bytes = encode(&sample).unwrap();
        assert_eq!(decode::<Sample>(&bytes).unwrap(), sample);
        for (bytes, word) in [
            (bytes[..bytes.len() - 1].to_vec(), "cannot be read"),
            ([bytes.as_slice(), &[0]].concat(), "1 bytes too many"),
            (vec![0; MAX + 1], "the most"),
        ] {
            let error = decode::<Sample>(&bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(encode(&vec![1u8; MAX]).is_err(), "its length comes on top");
    }

    #[test]
    fn a_list_has_an_end() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Few(#[serde(deserialize_with = "at_most::<3, _, _>")] Vec<u16>);

        for (len, ok) in [(0, true), (3, true), (4, false), (1000, false)] {
            let few = Few(vec![7; len]);
            let decoded = decode::<Few>(&encode(&few).unwrap());
            assert_eq!(decoded.is_ok(), ok, "{len}: {decoded:?}");
            assert!(!ok || decoded.unwrap() == few);
        }
        // The list claims a length that its bytes have not.
        decode::<Few>(&[0xff, 0xff, 0xff, 0xff, 0xf, 1, 2]).unwrap_err();
    }

    #[test]
    fn what_differs_is_named() {
        same("capacity", &1, &1).unwrap();
        let error = same("capacity", &1, &2).unwrap_err().to_string();
        assert!(error.contains("capacity was 1 and is 2 here"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(sample) = decode::<Sample>(&bytes) {
                prop_assert_eq!(decode::<Sample>(&encode(&sample).unwrap()).unwrap(), sample);
            }
        }
    }
}

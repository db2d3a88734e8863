//! How the state of a device becomes bytes and comes back: postcard, with a bound.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StateError;

/// No device has more to say; a share with a million files known to its guest stays below.
pub const MAX: usize = 64 << 20;

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

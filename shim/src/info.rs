//! `-info`: what this runtime is and can do.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

/// Its name, as clients give it.
pub const NAME: &str = "io.containerd.supermachine.v2";
/// Its version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer to `-info`, given the options on standard input.
pub fn answer(input: &[u8]) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let features = runtime_spec::features();
    let annotations = features.annotations().clone().unwrap_or_default();
    let any = Any { type_url: FEATURES.into(), value: serde_json::to_vec(&features)?, ..Any::default() };
    let options = Any::parse_from_bytes(input).ok().filter(|options| !options.type_url.is_empty());
    let info = RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(RuntimeVersion { version: VERSION.into(), ..RuntimeVersion::default() }),
        options: options.into(),
        features: MessageField::some(any),
        annotations,
        ..RuntimeInfo::default()
    };
    Ok(info.write_to_bytes()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_what_containerd_looks_at() {
        let info = RuntimeInfo::parse_from_bytes(&answer(&[]).unwrap()).unwrap();
        assert_eq!(info.name, NAME);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert!(info.annotations.contains_key(runtime_spec::features::ALLOW_MOUNTS));
        assert!(info.options.is_none());
    }
}

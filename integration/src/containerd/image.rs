//! From the name of an image to the snapshot that holds its unpacked layers.

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::api::Api;

/// More than any manifest; layers are not read.
const LARGEST_DOCUMENT: usize = 4 << 20;

impl Api {
    /// The key of the committed snapshot on which containers of `image` are prepared.
    pub(super) fn top_layer(&self, image: &str) -> Result<String> {
        let digest = self.image_digest(image)?;
        let config = self.config_of(&digest).with_context(|| format!("reading the image {image}"))?;
        chain_id(&config).with_context(|| format!("the configuration of the image {image}"))
    }

    /// Follows an index to this machine's manifest, and the manifest to the configuration.
    fn config_of(&self, digest: &str) -> Result<Value> {
        let document = self.document(digest)?;
        let manifest = match document.get("manifests") {
            Some(manifests) => self.document(pick(manifests)?)?,
            None => document,
        };
        self.document(digest_of(&manifest["config"])?)
    }

    fn document(&self, digest: &str) -> Result<Value> {
        let bytes = self.content(digest, LARGEST_DOCUMENT)?;
        serde_json::from_slice(&bytes).with_context(|| format!("reading {digest}"))
    }
}

/// The manifest of an index for this machine. One without a platform fits any.
fn pick(manifests: &Value) -> Result<&str> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |manifest: &&Value| match &manifest["platform"]["architecture"] {
        Value::String(found) => found == architecture,
        _ => true,
    };
    let manifests = manifests.as_array().context("an index whose manifests are no list")?;
    match manifests.iter().find(fits) {
        Some(manifest) => digest_of(manifest),
        None => bail!("the index has no manifest for {architecture}"),
    }
}

fn digest_of(descriptor: &Value) -> Result<&str> {
    descriptor["digest"].as_str().context("a descriptor without a digest")
}

/// OCI image specification, "Layer ChainID": the name of a stack of layers.
fn chain_id(config: &Value) -> Result<String> {
    let layers = config["rootfs"]["diff_ids"].as_array().context("has no rootfs.diff_ids")?;
    let mut chain = String::new();
    for layer in layers {
        let layer = layer.as_str().context("has a layer that is no text")?;
        chain = if chain.is_empty() { layer.to_owned() } else { sha256(&format!("{chain} {layer}")) };
    }
    if chain.is_empty() {
        bail!("has no layers");
    }
    Ok(chain)
}

fn sha256(text: &str) -> String {
    let mut named = String::from("sha256:");
    for byte in Sha256::digest(text.as_bytes()) {
        let _ = write!(named, "{byte:02x}");
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn chains_follow_the_specification() {
        let config = |layers: &[&str]| json!({"rootfs": {"diff_ids": layers}});
        assert_eq!(chain_id(&config(&["sha256:a"])).unwrap(), "sha256:a");
        let two = chain_id(&config(&["sha256:a", "sha256:b"])).unwrap();
        assert_eq!(two, sha256("sha256:a sha256:b"));
        let three = chain_id(&config(&["sha256:a", "sha256:b", "sha256:c"])).unwrap();
        assert_eq!(three, sha256(&format!("{two} sha256:c")));
        assert!(chain_id(&config(&[])).is_err() && chain_id(&json!({})).is_err());
        assert_eq!(sha256("abc"), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn the_manifest_of_this_machine_is_picked() {
        let index = json!([
            {"digest": "sha256:x", "platform": {"architecture": "vax"}},
            {"digest": "sha256:any"}
        ]);
        assert_eq!(pick(&index).unwrap(), "sha256:any");
        assert!(pick(&json!([{"digest": "d", "platform": {"architecture": "vax"}}])).is_err());
        assert!(pick(&json!({})).is_err());
    }
}

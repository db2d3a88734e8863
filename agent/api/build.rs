//! Generates messages, client and server from the protocol's file, in pure Rust.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTO: &str = "proto/agent.proto";

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed={PROTO}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets OUT_DIR"))?);
    Codegen::new()
        .out_dir(&out)
        .input(PROTO)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false).generate_accessors(false))
        .customize(Customize { async_all: true, ..Customize::default() })
        .run()?;
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        strip_inner_attributes(&out.join(name))?;
    }
    Ok(())
}

/// The files are included into modules, where neither inner attributes nor inner comments may stand.
fn strip_inner_attributes(path: &Path) -> io::Result<()> {
    let text = fs::read_to_string(path)?;
    let kept: Vec<_> =
        text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).collect();
    fs::write(path, kept.join("\n"))
}

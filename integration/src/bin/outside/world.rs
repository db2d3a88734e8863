//! Where the tool is, and how these tests call it.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use integration::bed::Bed;
use integration::command::Cmd;
use integration::{Ctx, World};
use lexopt::ValueExt;

pub struct Outside {
    tool: PathBuf,
    arch: String,
}

impl Default for Outside {
    fn default() -> Self {
        Self { tool: "hack/testbed".into(), arch: env::consts::ARCH.into() }
    }
}

impl World for Outside {
    const OPTIONS: &'static str =
        "  --testbed PROGRAM         the tool that runs emulated hosts (hack/testbed)
  --arch x86_64|aarch64     of the emulated host (this machine's)";

    fn option(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool> {
        match name {
            "testbed" => self.tool = parser.value()?.into(),
            "arch" => {
                self.arch = parser.value()?.string()?;
                ensure!(["x86_64", "aarch64"].contains(&self.arch.as_str()), "x86_64 or aarch64");
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl Outside {
    /// The emulated host as this machine's user has it, cache and all.
    pub fn bed(&self) -> Result<Bed> {
        let cache = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
            Some(directory) => PathBuf::from(directory),
            None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
                .join(".cache"),
        };
        let tool = self
            .tool
            .canonicalize()
            .with_context(|| format!("finding the tool {}; name it with --testbed", self.tool.display()))?;
        Ok(Bed { tool, arch: self.arch.clone(), cache: cache.join("supermachine/testbed") })
    }

    /// `hack/testbed run` of `argv`, ready to start.
    pub fn run<A: AsRef<OsStr>>(
        ctx: &Ctx<'_, Self>,
        options: &[&str],
        argv: impl IntoIterator<Item = A>,
    ) -> Result<Cmd> {
        let bed = ctx.world.bed()?;
        Ok(bed.run(ctx.cmd(&bed.tool), options, argv))
    }
}

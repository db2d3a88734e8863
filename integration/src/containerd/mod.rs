//! containerd, driven both ways its users drive it: through `ctr` and through its gRPC API.

mod api;
mod checkpoint;
mod container;
mod ctr;
mod exec;
mod image;
mod shim;
mod spec;

pub use api::{Api, Version, refusal};
pub use checkpoint::Checkpoint;
pub use container::{Container, NewContainer, Stdio};
pub use containerd_client::types::Mount;
pub use ctr::Ctr;
pub use exec::Exec;
pub use shim::shim_of;
pub use spec::spec;

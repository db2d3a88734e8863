//! containerd, driven both ways its users drive it: through `ctr` and through its gRPC API.

mod api;
mod container;
mod ctr;
mod image;
mod spec;

pub use api::{Api, Version};
pub use container::{Container, NewContainer, Stdio};
pub use containerd_client::types::Mount;
pub use ctr::Ctr;

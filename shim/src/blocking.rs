//! Work that blocks, on a thread that may.

use crate::error::{Attempt, Result};

/// Runs what blocks.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(run).await.map_err(std::io::Error::other).attempt(what)?
}

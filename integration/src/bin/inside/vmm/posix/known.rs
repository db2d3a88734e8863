//! Where a share is not like the host's file system, and why it is not. `docs/filesystem.md` tells people.

/// One case that comes out differently.
pub struct Difference {
    /// Its name.
    pub case: &'static str,
    /// What comes of it on the host.
    pub host: &'static str,
    /// What comes of it on the share.
    pub share: &'static str,
    /// Why.
    pub why: &'static str,
}

pub const DIFFERENCES: &[Difference] = &[];

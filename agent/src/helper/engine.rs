//! What libcontainer calls in the container's process: everything of the last steps is ours ([`Finish`]), because the
//! crate forgets the seccomp profile beside a container's own process, and words failures in its own way.

use std::collections::HashMap;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;

use super::finish::Finish;
use super::terminal;

/// Marks our words among those of the crate.
pub const OURS: char = '\u{1}';

/// The end of a container's making.
#[derive(Clone)]
pub struct Engine {
    pub finish: Finish,
    /// Columns and rows, if there is a terminal that has any.
    pub size: Option<(u16, u16)>,
}

impl Executor for Engine {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        if let Some(size) = self.size {
            let _ = terminal::resize(std::io::stdin(), size);
        }
        let confined = self.finish.confine().and_then(|()| self.finish.find());
        let told = |error: anyhow::Error| {
            ExecutorValidationError::ArgValidationError(format!("{OURS}{error:#}{OURS}"))
        };
        confined.map(drop).map_err(told)
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The program gets what the spec says, in its order, when it is executed.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        self.finish.execute_or_exit()
    }
}

/// What we said ourselves, of a text that has it somewhere.
pub fn ours(text: &str) -> Option<&str> {
    text.split(OURS).nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_words_are_found() {
        assert_eq!(ours("failed: \u{1}exec: x\u{1} there"), Some("exec: x"));
        assert_eq!(ours("failed"), None);
    }
}

//! Why a call fails: a code that clients match on, and a text that some of them read too.

use std::fmt::Display;

use ttrpc::Code;
use ttrpc::error::get_status;

/// A call's failure, as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    /// What clients match on.
    pub code: Code,
    /// What was attempted, on what, and what to do.
    pub text: String,
}

/// A result of a call.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident $code:ident;)*) => {
        impl Error { $($(#[$doc])* pub fn $name(text: impl Display) -> Self { Self { code: Code::$code, text: text.to_string() } })* }
    };
}

kinds! {
    /// There is no such thing.
    not_found NOT_FOUND;
    /// There is one already.
    already_exists ALREADY_EXISTS;
    /// Not in this state.
    precondition FAILED_PRECONDITION;
    /// The request makes no sense.
    invalid INVALID_ARGUMENT;
    /// This runtime does not do that.
    unimplemented UNIMPLEMENTED;
    /// It took too long.
    deadline DEADLINE_EXCEEDED;
    /// The machine cannot be reached.
    unavailable UNAVAILABLE;
    /// Anything else.
    unknown UNKNOWN;
}

impl Error {
    /// With what was attempted in front.
    #[must_use]
    pub fn context(mut self, what: impl Display) -> Self {
        self.text = format!("{what}: {}", self.text);
        self
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code, error.text))
    }
}

/// Of a call to the agent: its own errors are passed on, those of the connection are told apart.
impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                Self { code: status.code.enum_value_or(Code::UNKNOWN), text: status.message }
            }
            ttrpc::Error::LocalClosed | ttrpc::Error::RemoteClosed | ttrpc::Error::Eof => {
                Self::unavailable("the machine is gone: ttrpc: closed")
            }
            // A missed deadline is nothing else to ttrpc.
            ttrpc::Error::Others(text) => {
                Self::deadline(format!("the agent of the machine did not answer: {text}"))
            }
            other => Self::unavailable(format!("the agent of the machine cannot be reached: {other}")),
        }
    }
}

/// Of planning: never UNIMPLEMENTED, which makes containerd try an older protocol on the same shim.
impl From<runtime_spec::Error> for Error {
    fn from(error: runtime_spec::Error) -> Self {
        match error {
            runtime_spec::Error::Unsupported { .. } => Self::precondition(error),
            _ => Self::invalid(error),
        }
    }
}

/// Says what was attempted when the operating system refuses.
pub trait Attempt<T> {
    /// `what` is what was attempted, and on what.
    fn attempt(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: impl Display) -> Result<T> {
        self.map_err(|error| {
            let error = error.into();
            let text = format!("{what}: {error}");
            match error.kind() {
                std::io::ErrorKind::TimedOut => Error::deadline(text),
                _ => Error::unknown(text),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planning_never_says_unimplemented() {
        let unsupported = runtime_spec::Error::Unsupported {
            path: "a".into(),
            asked: "b".into(),
            why: "c".into(),
            instead: "d".into(),
        };
        assert_eq!(Error::from(unsupported).code, Code::FAILED_PRECONDITION);
        let missing = runtime_spec::Error::Missing { path: "a".into(), asked: "/b".into() };
        assert_eq!(Error::from(missing).code, Code::INVALID_ARGUMENT);
    }

    #[test]
    fn codes_of_the_agent_are_passed_on() {
        let theirs = ttrpc::Error::from(Error::not_found("process already finished: not found"));
        assert_eq!(Error::from(theirs), Error::not_found("process already finished: not found"));
        assert_eq!(Error::from(ttrpc::Error::RemoteClosed).code, Code::UNAVAILABLE);
        let late = ttrpc::Error::Others("Request deadline elapsed".into());
        assert_eq!(Error::from(late).code, Code::DEADLINE_EXCEEDED);
    }
}

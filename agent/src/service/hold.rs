//! A container that is about to be saved with its machine: its streams are held, and what the host has of its files is
//! brought up to date.

use std::sync::Arc;
use std::time::Duration;

use agent_api::agent::{HoldRequest, HoldResponse, Output};
use agent_api::stdio::Stream;
use anyhow::Context;
use tokio::time::timeout;
use ttrpc::Code;

use super::{Agent, Failure, Outcome};
use crate::machine::settings;
use crate::process::Process;
use crate::process::streams::{Hold, Sent};

/// For what is on its way, once nothing is sent any more.
const DEADLINE: Duration = Duration::from_secs(20);
const STREAMS: [Stream; 3] = [Stream::Stdin, Stream::Stdout, Stream::Stderr];

impl Agent {
    /// Begins to hold the streams, or waits until they stand still: see the protocol.
    pub(super) async fn hold(&self, request: &HoldRequest) -> Outcome<HoldResponse> {
        if !request.all {
            self.hold_all(&request.id, Hold::Yes)?;
            return Ok(HoldResponse::default());
        }
        for input in &request.inputs {
            let process = self.process(&request.id, &input.exec_id)?;
            if let Some(line) = process.line(Stream::Stdin) {
                line.hold(Hold::Until(Sent { bytes: input.bytes, ended: input.ended }));
            }
        }
        let mut outputs = Vec::new();
        let still = async {
            for process in &self.processes(&request.id)? {
                for stream in STREAMS {
                    let Some(line) = process.line(stream) else { continue };
                    let moved = line.stillness().await;
                    if stream != Stream::Stdin {
                        outputs.push(Output {
                            exec_id: process.exec_id.clone(),
                            stderr: stream == Stream::Stderr,
                            bytes: moved,
                            ..Output::default()
                        });
                    }
                }
            }
            Outcome::Ok(())
        };
        timeout(DEADLINE, still).await.unwrap_or_else(|_| {
            let text = "what is on its way to the processes of the container did not arrive in time";
            Err(Failure::new(Code::DEADLINE_EXCEEDED, text))
        })?;
        let forgetting = tokio::task::spawn_blocking(settings::forget).await;
        forgetting.context("writing back")??;
        Ok(HoldResponse { outputs, ..HoldResponse::default() })
    }

    /// Lets the streams go on.
    pub(super) fn release(&self, id: &str) -> Outcome<()> {
        self.hold_all(id, Hold::No)
    }

    fn hold_all(&self, id: &str, hold: Hold) -> Outcome<()> {
        let processes = self.processes(id)?;
        processes.iter().flat_map(|process| process.lines()).for_each(|line| line.hold(hold));
        Ok(())
    }

    /// All of a container.
    fn processes(&self, id: &str) -> Outcome<Vec<Arc<Process>>> {
        let container = self.container(id)?;
        Ok(container.execs().into_iter().chain([Arc::clone(&container.init)]).collect())
    }
}

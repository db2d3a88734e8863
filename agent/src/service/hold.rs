//! A container that is about to be saved with its machine: its streams are held, and what the host has of its files is
//! brought up to date.

use std::time::Duration;

use agent_api::agent::{HoldRequest, HoldResponse, Output};
use agent_api::stdio::Stream;
use anyhow::Context;
use tokio::time::timeout;
use ttrpc::Code;

use super::{Agent, Failure, Outcome};
use crate::machine::settings;
use crate::process::streams::{Hold, Sent};

/// For what is on its way, once nothing is sent any more.
const DEADLINE: Duration = Duration::from_secs(20);
const STREAMS: [Stream; 3] = [Stream::Stdin, Stream::Stdout, Stream::Stderr];

impl Agent {
    /// Begins to hold the streams, or waits until they stand still: see the protocol.
    pub(super) async fn hold(&self, request: &HoldRequest) -> Outcome<HoldResponse> {
        let container = self.container(&request.id)?;
        let mut processes = container.execs();
        processes.push(container.init.clone());
        if !request.all {
            processes.iter().flat_map(|process| process.lines()).for_each(|line| line.hold(Hold::Yes));
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
            for process in &processes {
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
        };
        if timeout(DEADLINE, still).await.is_err() {
            let text = "what is on its way to the processes of the container did not arrive in time";
            return Err(Failure::new(Code::DEADLINE_EXCEEDED, text));
        }
        let forgetting = tokio::task::spawn_blocking(settings::forget).await;
        forgetting.context("writing back")??;
        Ok(HoldResponse { outputs, ..HoldResponse::default() })
    }

    /// Lets the streams go on.
    pub(super) fn release(&self, id: &str) -> Outcome<()> {
        let container = self.container(id)?;
        let mut processes = container.execs();
        processes.push(container.init.clone());
        processes.iter().flat_map(|process| process.lines()).for_each(|line| line.hold(Hold::No));
        Ok(())
    }
}

//! TCP in the guest.

use std::io::Write;
use std::net::{Ipv6Addr, TcpListener};
use std::thread;

use anyhow::{Context, Result};
use integration::streams::answer;

/// Answers every stream to `port`, for ever. Those of v4 come to a v6 socket, too.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listening")?;
    println!("listening");
    std::io::stdout().flush()?;
    loop {
        let (stream, _) = listener.accept().context("accepting")?;
        // What is written in pieces is to travel in pieces.
        stream.set_nodelay(true).context("sending at once")?;
        thread::spawn(move || {
            if let Err(error) = answer(&stream) {
                eprintln!("guest-part: answering: {error}");
            }
        });
    }
}

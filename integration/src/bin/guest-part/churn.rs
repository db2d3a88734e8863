//! A guest that works with its memory while the host gives and takes: pieces with a pattern each, of which one
//! after the other is checked and replaced.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use integration::pattern;

use crate::mapping::Pages;

/// Bytes of a piece.
const PIECE: usize = 1 << 20;

struct Piece {
    seed: u64,
    pages: Pages,
}

impl Piece {
    fn new(seed: u64) -> Result<Self> {
        let mut pages = Pages::new(PIECE)?;
        pattern::fill(seed, 0, pages.bytes_mut());
        Ok(Self { seed, pages })
    }

    fn check(&self) -> Result<()> {
        match pattern::wrong(self.seed, 0, self.pages.bytes()) {
            None => Ok(()),
            Some(at) => bail!("byte {at} of a piece of memory has changed"),
        }
    }
}

/// What the lines of the input ask for.
#[derive(Default)]
struct Wanted {
    pieces: AtomicUsize,
    ended: AtomicBool,
}

fn listen(wanted: &Wanted) {
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        if let Ok(pieces) = line.trim().parse() {
            wanted.pieces.store(pieces, Ordering::Relaxed);
        }
    }
    wanted.ended.store(true, Ordering::Relaxed);
}

/// Works until its input ends, and says each time when it has come to hold as much as it was told.
pub fn run(first: u64) -> Result<()> {
    let wanted = Arc::new(Wanted::default());
    let listener = Arc::clone(&wanted);
    thread::spawn(move || listen(&listener));
    let (mut pieces, mut seed, mut told) = (Vec::new(), first, 0);
    while !wanted.ended.load(Ordering::Relaxed) {
        let count = wanted.pieces.load(Ordering::Relaxed);
        if pieces.len() > count {
            pieces.drain(count..).try_for_each(|piece: Piece| piece.check())?;
        }
        if pieces.len() < count {
            pieces.push(Piece::new(seed).with_context(|| format!("after {} MiB", pieces.len()))?);
        } else if told != count {
            told = count;
            println!("holding {count}");
            io::stdout().flush()?;
        } else if count > 0 {
            // Each one in turn, in steps that leave none out for long.
            let index = (seed as usize).wrapping_mul(7) % count;
            pieces[index].check()?;
            pieces[index] = Piece::new(seed)?;
        }
        seed += 1;
    }
    pieces.iter().try_for_each(Piece::check)?;
    println!("{} pieces were what they should be", seed - first);
    Ok(())
}

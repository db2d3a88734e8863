//! What the agent and the crates that it uses have to say, on the machine's console, of which each byte costs an exit
//! of the machine: so failures, and more only on the kernel's command line, as `supermachine.log=debug`.

use log::{LevelFilter, Log, Metadata, Record};

const WORD: &str = "supermachine.log=";

struct Console;

impl Log for Console {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str().to_ascii_lowercase();
        eprintln!("supermachine-agent: {level}: {}", record.args());
    }

    fn flush(&self) {}
}

/// Begins to log, as the kernel's command line says.
pub fn start(command_line: &str) {
    log::set_max_level(level(command_line));
    let _ = log::set_logger(&Console);
}

fn level(command_line: &str) -> LevelFilter {
    let words = command_line.split_whitespace();
    let asked = words.filter_map(|word| word.strip_prefix(WORD)?.parse().ok()).next_back();
    asked.unwrap_or(LevelFilter::Warn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        for (line, expected) in [
            ("quiet", LevelFilter::Warn),
            ("quiet supermachine.log=debug", LevelFilter::Debug),
            ("supermachine.log=trace supermachine.log=off", LevelFilter::Off),
            ("supermachine.log=loud", LevelFilter::Warn),
        ] {
            assert_eq!(level(line), expected, "{line}");
        }
    }
}

//! The command line that all test programs have in common.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use lexopt::{Arg, Parser, ValueExt};

use crate::filter::Filter;
use crate::leaks::Scope;
use crate::logs::LogSources;
use crate::test::{Rounds, Test};

/// What the tests of one program share: where things are. Filled from the program's own options.
pub trait World: Default {
    /// The program's own part of the usage text; each line begins with two spaces.
    const OPTIONS: &'static str;

    /// Takes the long option `name` (its value from `parser`) or says that it has no such option.
    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool>;

    /// What to attach to a failing test.
    fn logs(&self) -> LogSources {
        LogSources::default()
    }

    /// What each test must leave as it found it.
    fn leaks(&self) -> Option<Scope> {
        None
    }
}

/// Which of a test's two counts is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// For every change.
    #[default]
    Short,
    /// In a soak.
    Long,
}

/// One round of one test, to be run in this very process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct One {
    pub name: String,
    pub round: u32,
    pub scratch: PathBuf,
    pub outcome: PathBuf,
}

#[derive(Debug, Default)]
pub(crate) struct Options {
    pub list: bool,
    pub help: bool,
    pub filter: Filter,
    pub results: Option<PathBuf>,
    pub logs: Option<PathBuf>,
    pub scale: Scale,
    pub count: Option<u32>,
    pub minutes: Option<u32>,
    pub one: Option<One>,
}

const COMMON: &str = "  --list                    print the tests and what they prove
  --filter TEXT[,TEXT]      only tests whose name contains one of these, or is it (=TEXT), and none of those (-TEXT)
  --scale short|long        how often each test is run: its count for every change, or for a soak
  --count N                 run each test N times, whatever the scale
  --minutes N               begin no test after that time; those that are left are skipped, and said to be
  --results FILE            append one line of JSON for each test
  --logs DIR                keep the full logs of every test there";

pub(crate) fn usage<W: World>(program: &str) -> String {
    let own = W::OPTIONS;
    format!("usage: {program} [OPTION]...\n\n{COMMON}\n{own}{}", if own.is_empty() { "" } else { "\n" })
}

impl Options {
    /// Reads `arguments`; those that are not common go to `world`.
    pub(crate) fn parse<W: World>(
        arguments: impl IntoIterator<Item = OsString>,
        world: &mut W,
    ) -> Result<Self> {
        let mut options = Self::default();
        let mut one = (None, 1, None, None);
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next()? {
            let name = match argument {
                Arg::Long(name) => name.to_owned(),
                Arg::Short('h') => "help".to_owned(),
                other => return Err(other.unexpected().into()),
            };
            match name.as_str() {
                "help" => options.help = true,
                "list" => options.list = true,
                "filter" => options.filter.add(&parser.value()?.string()?),
                "results" => options.results = Some(parser.value()?.into()),
                "logs" => options.logs = Some(parser.value()?.into()),
                "scale" => options.scale = parser.value()?.parse_with(scale)?,
                "count" => options.count = Some(parser.value()?.parse_with(count)?),
                "minutes" => options.minutes = Some(parser.value()?.parse_with(count)?),
                "one" => one.0 = Some(parser.value()?.string()?),
                "round" => one.1 = parser.value()?.parse()?,
                "scratch" => one.2 = Some(PathBuf::from(parser.value()?)),
                "outcome" => one.3 = Some(PathBuf::from(parser.value()?)),
                _ => {
                    if !world.option(&name, &mut parser).with_context(|| format!("option --{name}"))? {
                        bail!("there is no option --{name}; --help lists them");
                    }
                }
            }
        }
        options.one = match one {
            (None, _, None, None) => None,
            (Some(name), round, Some(scratch), Some(outcome)) => Some(One { name, round, scratch, outcome }),
            _ => bail!("--one, --scratch and --outcome belong together and are for the program itself"),
        };
        Ok(options)
    }

    pub(crate) fn rounds(&self, rounds: Rounds) -> u32 {
        self.count.unwrap_or(match self.scale {
            Scale::Short => rounds.short,
            Scale::Long => rounds.long,
        })
    }
}

fn scale(text: &str) -> Result<Scale> {
    match text {
        "short" => Ok(Scale::Short),
        "long" => Ok(Scale::Long),
        _ => bail!("a scale is short or long"),
    }
}

fn count(text: &str) -> Result<u32> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => bail!("a count is a whole number above zero"),
    }
}

/// The table, for `--list`.
pub(crate) fn list<W>(tests: &[Test<W>], options: &Options) -> String {
    let selected = || tests.iter().filter(|test| options.filter.selects(test.name));
    let width = selected().map(|test| test.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for test in selected() {
        let (Rounds { short, long }, name) = (test.rounds, test.name);
        let tags = if test.tags.is_empty() { String::new() } else { format!(" [{}]", test.tags.join(", ")) };
        let _ = writeln!(text, "{name:<width$}  {short:>2}/{long:<3} {}{tags}", test.proves);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Here {
        address: String,
    }

    impl World for Here {
        const OPTIONS: &'static str = "  --address SOCKET          where";

        fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool> {
            if name != "address" {
                return Ok(false);
            }
            self.address = parser.value()?.string()?;
            Ok(true)
        }
    }

    fn parse(line: &str) -> Result<(Options, Here)> {
        let mut world = Here::default();
        let options = Options::parse(line.split_whitespace().map(OsString::from), &mut world)?;
        Ok((options, world))
    }

    #[test]
    fn common_and_own_options_are_told_apart() {
        let (options, world) =
            parse("--filter runc,kvm --address /s --scale long --results r --logs l --filter share").unwrap();
        assert_eq!(world.address, "/s");
        let mut filter = Filter::default();
        filter.add("runc,kvm,share");
        assert_eq!(options.filter, filter);
        let rounds = Rounds { short: 1, long: 20 };
        assert_eq!(options.rounds(rounds), 20);
        assert_eq!(parse("").unwrap().0.rounds(rounds), 1);
        assert_eq!(parse("--scale long --count 3").unwrap().0.rounds(rounds), 3);
    }

    #[test]
    fn one_round_is_for_the_program_itself() {
        let (options, _) = parse("--one a.b --round 3 --scratch /s --outcome /o").unwrap();
        let one = One { name: "a.b".into(), round: 3, scratch: "/s".into(), outcome: "/o".into() };
        assert_eq!(options.one, Some(one));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, expected) in [
            ("--adress x", "--adress"),
            ("stray", "stray"),
            ("--scale medium", "short or long"),
            ("--count 0", "above zero"),
            ("--minutes 0", "above zero"),
            ("--filter", "filter"),
            ("--address", "address"),
            ("--one x", "belong together"),
        ] {
            let error = format!("{:#}", parse(line).err().unwrap());
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}

//! References between mounts, as containerd's mount manager has them: `{{ mount 0 }}` is where the first one
//! is mounted, `{{ overlay 0 2 }}` where the first three are, with colons between. And its `mkdir` options.

use std::path::{Path, PathBuf};

use crate::plan::Directory;

/// Whether there is a reference in it.
pub(super) fn is(text: &str) -> bool {
    text.contains("{{")
}

/// The parts of a list with colons between, without those that are references.
pub(super) fn split_outside(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        parts.extend(before.split(':'));
        // What follows a reference, as `/upper` does, belongs to it.
        let after = after.split_once("}}").map_or("", |(_, after)| after);
        rest = after.split_once(':').map_or("", |(_, rest)| rest);
    }
    parts.extend(rest.split(':'));
    parts
}

/// Puts places where references are. Only earlier mounts can be referred to.
pub(super) fn expand(text: &str, places: &[PathBuf]) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (reference, after) = after.split_once("}}").ok_or("a reference ends with `}}`")?;
        expanded.push_str(before);
        expanded.push_str(&resolve(reference, places)?);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn resolve(reference: &str, places: &[PathBuf]) -> Result<String, String> {
    let words: Vec<_> = reference.split_whitespace().collect();
    let place = |index: usize| {
        let place = places.get(index).and_then(|place| place.to_str());
        place.map(str::to_owned).ok_or_else(|| format!("there is no mount {index} before it"))
    };
    let number =
        |word: &str| word.parse::<usize>().map_err(|_| format!("{word:?} is not the number of a mount"));
    match words[..] {
        ["mount", index] => place(number(index)?),
        ["overlay", first, last] => {
            let (first, last) = (number(first)?, number(last)?);
            // Both exist, which bounds the range.
            place(first)?;
            place(last)?;
            let all: Result<Vec<_>, _> = if first <= last {
                (first..=last).map(place).collect()
            } else {
                (last..=first).rev().map(place).collect()
            };
            Ok(all?.join(":"))
        }
        _ => {
            Err(format!("of references there are `mount` and `overlay`, and {{{{{reference}}}}} is neither"))
        }
    }
}

/// `path=PATH[:MODE[:UID:GID]]`
pub(super) fn directory(option: &str) -> Result<Directory, String> {
    let value = option.strip_prefix("path=").ok_or("of mkdir options there is `path`")?;
    let parts: Vec<_> = value.split(':').collect();
    let (path, mode, owner) = match parts[..] {
        [path] => (path, "700", None),
        [path, mode] => (path, mode, None),
        [path, mode, uid, gid] => (path, mode, Some((uid, gid))),
        _ => return Err("it is PATH, PATH:MODE or PATH:MODE:UID:GID".to_owned()),
    };
    let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
    let mode = mode.ok_or("the mode is of three octal digits")?;
    let id = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is not an id"));
    let owner = owner.map(|(uid, gid)| Ok::<_, String>((id(uid)?, id(gid)?))).transpose()?;
    if path.is_empty() || Path::new(path).components().any(|part| part.as_os_str() == "..") {
        return Err("it makes a directory without `..`".to_owned());
    }
    Ok(Directory { path: path.into(), mode, owner })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let places = ["/a", "/b", "/c"].map(PathBuf::from);
        for (text, expanded) in [
            ("ro", Some("ro")),
            ("upperdir={{ mount 0 }}/upper", Some("upperdir=/a/upper")),
            ("lowerdir={{ overlay 1 2 }}", Some("lowerdir=/b:/c")),
            ("lowerdir={{ overlay 2 0 }}", Some("lowerdir=/c:/b:/a")),
            ("lowerdir={{overlay 1 1}}:{{mount 0}}", Some("lowerdir=/b:/a")),
            ("{{ mount 3 }}", None),
            ("{{ mount -1 }}", None),
            ("{{ overlay 0 99999999999 }}", None),
            ("{{ overlay 18446744073709551615 0 }}", None),
            ("{{ source 0 }}", None),
            ("{{ mount 0", None),
            ("{{ }}", None),
        ] {
            assert_eq!(expand(text, &places).ok().as_deref(), expanded, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_reference() {
        for (text, outside) in [
            ("/a:/b", vec!["/a", "/b"]),
            ("{{ mount 0 }}/upper", vec!["", ""]),
            ("{{ mount 0 }}/upper:/b", vec!["", "/b"]),
            ("/a:{{ mount 0 }}", vec!["/a", "", ""]),
        ] {
            assert_eq!(split_outside(text), outside, "{text}");
        }
    }

    #[test]
    fn directories() {
        let made = |path: &str, mode, owner| Some(Directory { path: path.into(), mode, owner });
        for (option, directory) in [
            ("path=/a", made("/a", 0o700, None)),
            ("path=/a:0755", made("/a", 0o755, None)),
            ("path=/a:755:1:2", made("/a", 0o755, Some((1, 2)))),
            ("path=/a:755:1", None),
            ("path=/a:9", None),
            ("path=/a:4755", None),
            ("path=/a:755:x:y", None),
            ("path=/a/../b", None),
            ("path=", None),
            ("mode=1", None),
        ] {
            assert_eq!(super::directory(option).ok(), directory, "{option}");
        }
    }
}

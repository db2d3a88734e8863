//! Which tests are wanted, by words: TEXT is anywhere in a name, =TEXT is all of it, and -TEXT or -=TEXT leaves such out.

/// The words, of which a name has to match one that is for it, if there is any, and none that is against it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Filter {
    words: Vec<String>,
}

impl Filter {
    /// Adds the words of `text`, which commas part.
    pub fn add(&mut self, text: &str) {
        self.words.extend(text.split(',').filter(|word| !word.is_empty()).map(str::to_owned));
    }

    /// Whether what has this name is wanted.
    pub fn selects(&self, name: &str) -> bool {
        let (without, with): (Vec<_>, Vec<_>) = self.words.iter().partition(|word| word.starts_with('-'));
        let chosen = with.is_empty() || with.iter().any(|word| matches(word, name));
        chosen && !without.iter().any(|word| matches(word, name))
    }

    /// The first word that is about none of these names.
    pub fn unmatched(&self, names: &[&str]) -> Option<&str> {
        let known = |word: &&String| !names.iter().any(|name| matches(word, name));
        self.words.iter().find(known).map(String::as_str)
    }
}

/// Whether a word is about a name, for or against it.
fn matches(word: &str, name: &str) -> bool {
    let word = word.strip_prefix('-').unwrap_or(word);
    match word.strip_prefix('=') {
        Some(whole) => name == whole,
        None => name.contains(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_for_names_or_against_them() {
        for (text, chosen, unmatched) in [
            ("", &["a.b", "a.bc", "a.d"][..], None),
            ("a.,-b,-=a.d", &[], None),
            ("-b", &["a.d"], None),
            ("=a.b", &["a.b"], None),
            ("=a.b,=a.d", &["a.b", "a.d"], None),
            ("a,-=a.b", &["a.bc", "a.d"], None),
            ("x,a", &["a.b", "a.bc", "a.d"], Some("x")),
            ("a,-=a.x", &["a.b", "a.bc", "a.d"], Some("-=a.x")),
            (",,", &["a.b", "a.bc", "a.d"], None),
        ] {
            let mut filter = Filter::default();
            filter.add(text);
            let names = ["a.b", "a.bc", "a.d"];
            let found: Vec<_> = names.into_iter().filter(|name| filter.selects(name)).collect();
            assert_eq!((&*found, filter.unmatched(&names)), (chosen, unmatched), "{text}");
        }
    }
}

//! The cases, by family. A case is its name and its steps; those before a bar prepare and tell only their failures.

mod access;
mod attributes;
mod data;
mod directories;
mod locks;
mod matrices;
mod names;
mod open;
pub mod readonly;
mod special;
mod xattrs;

/// One line of the table.
pub struct Case {
    /// The family, a point, and what is tried.
    pub name: String,
    /// What is done, with semicolons between the steps.
    pub steps: String,
}

/// As it stands in a table.
type Line = (&'static str, &'static str);

/// All cases, those of one family one behind the other.
pub fn all() -> Vec<Case> {
    let families: [(&str, &[Line]); 12] = [
        ("open", open::CASES),
        ("create", open::CREATING),
        ("names", names::CASES),
        ("rename", names::RENAMING),
        ("data", data::CASES),
        ("map", data::MAPS),
        ("attributes", attributes::CASES),
        ("xattr", xattrs::CASES),
        ("lock", locks::CASES),
        ("access", access::CASES),
        ("directory", directories::CASES),
        ("special", special::CASES),
    ];
    let listed = families.into_iter().flat_map(|(family, cases)| {
        cases
            .iter()
            .map(move |(name, steps)| Case { name: format!("{family}.{name}"), steps: (*steps).to_owned() })
    });
    listed.chain(matrices::all()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let all = all();
        let names: BTreeSet<&str> = all.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.iter().all(|case| !case.name.contains([' ', ':', '/'])));
    }
}

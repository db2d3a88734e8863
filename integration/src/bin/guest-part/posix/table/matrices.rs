//! Cases for every pair of what there can be under a name.

use super::Case;

/// What there can be, and the steps that make one called `$`. Each is told apart from all others.
const THINGS: [(&str, &str); 6] = [
    ("nothing", ""),
    ("file", "file $ text-of-$"),
    ("empty-dir", "mkdir $"),
    ("full-dir", "mkdir $; file $/inner"),
    ("symlink", "symlink nowhere $"),
    ("fifo", "mkfifo $ 600"),
];

fn make(steps: &str, name: &str) -> String {
    steps.replace('$', name)
}

pub fn all() -> impl Iterator<Item = Case> {
    renames().chain(on_each()).chain(opens())
}

/// Renaming each over each, in each of the ways.
fn renames() -> impl Iterator<Item = Case> {
    const WAYS: [(&str, &str); 3] = [("over", ""), ("beside", " noreplace"), ("with", " exchange")];
    WAYS.iter().flat_map(|(way, flag)| {
        THINGS.iter().flat_map(move |(one, make_one)| {
            THINGS.iter().map(move |(other, make_other)| Case {
                name: format!("rename-{way}.{one}-{other}"),
                steps: format!(
                    "{}; {} | rename a b{flag}; type a; type b",
                    make(make_one, "a"),
                    make(make_other, "b")
                ),
            })
        })
    })
}

/// One call on each of them.
fn on_each() -> impl Iterator<Item = Case> {
    const CALLS: [(&str, &str); 13] = [
        ("unlink", "unlink a; type a"),
        ("rmdir", "rmdir a; type a"),
        ("link", "link a b; type b; lstat b n"),
        ("link-onto", "link x a; type a; lstat x n"),
        ("symlink-onto", "symlink x a; type a"),
        ("mkdir-onto", "mkdir a; type a"),
        ("mkfifo-onto", "mkfifo a 644; type a"),
        ("truncate", "truncate a 3; lstat a t"),
        ("chmod", "chmod a 751; lstat a m"),
        ("lchown", "lchown a 12:34; lstat a mo"),
        ("lutimes", "lutimes a 1000000001.5 1000000002.6; times a"),
        ("readlink", "readlink a"),
        ("slash-behind", "stat a/ t; unlink a/; mkdir a/; type a"),
    ];
    CALLS.iter().flat_map(|(call, steps)| {
        THINGS.iter().map(move |(thing, make_it)| Case {
            name: format!("{call}.{thing}"),
            steps: format!("{}; file x | {steps}", make(make_it, "a")),
        })
    })
}

/// Opening each of them in many ways. A fifo is opened without waiting for another end.
fn opens() -> impl Iterator<Item = Case> {
    const WAYS: [&str; 12] = [
        "r",
        "w",
        "rw",
        "w,trunc",
        "r,directory",
        "r,nofollow",
        "rw,creat",
        "rw,creat,excl",
        "r,creat",
        "w,append",
        "r,path",
        "r,path,nofollow",
    ];
    THINGS.iter().flat_map(|(thing, make_it)| {
        WAYS.iter().map(move |how| Case {
            name: format!("open-each.{thing}-{}", how.replace(',', "-")),
            steps: format!("{} | open 0 a {how},nonblock; lstat a ts", make(make_it, "a")),
        })
    })
}

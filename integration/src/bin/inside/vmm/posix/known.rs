//! Where a share is not like the host's file system, and why it is not. `docs/filesystem.md` tells people.

/// One case that comes out differently.
pub struct Difference {
    /// Its name.
    pub case: &'static str,
    /// What comes of it on the host.
    pub host: &'static str,
    /// What comes of it on the share.
    pub share: &'static str,
    /// Why.
    pub why: &'static str,
}

/// What the server of the share does not do at all.
const UNSERVED: &str = "the file server has no such request";
/// What the jail keeps from the server.
const ADMINISTRATORS: &str = "the server, in its jail, is no administrator of the host (CAP_SYS_ADMIN)";
/// What the guest's kernel does not pass on to any server.
const NOT_PASSED: &str = "the guest's kernel does not pass it on";

pub const DIFFERENCES: &[Difference] = &[
    Difference { case: "attributes.born", host: "known", share: "unknown", why: UNSERVED },
    Difference { case: "attributes.lsattr", host: "known", share: "ENOTTY", why: UNSERVED },
    Difference { case: "attributes.lsattr-directory", host: "known", share: "ENOTTY", why: UNSERVED },
    Difference {
        case: "attributes.statfs-type",
        host: "ef53",
        share: "65735546",
        why: "the type is that of the guest's file system, which is FUSE",
    },
    Difference {
        case: "attributes.chown-to-the-same-clears",
        host: "ok 0755 ok ok 0755",
        share: "ok 0755 ok ok 6755",
        why: "a change of owner that names neither user nor group is not passed on by the guest's kernel",
    },
    Difference {
        case: "attributes.write-clears-setuid-only",
        host: "ok 1 0766",
        share: "ok 1 2766",
        why: "the bit that is left says nothing without execution by the group, and the server is in the file's group",
    },
    Difference {
        case: "data.collapse",
        host: "ok 8192 a{6}cccc EINVAL",
        share: "EOPNOTSUPP 12288 a{6}bbbb EOPNOTSUPP",
        why: NOT_PASSED,
    },
    Difference {
        case: "data.insert",
        host: "ok 12288 aa\\0\\0 \\0\\0bb",
        share: "EOPNOTSUPP 8192 aabb bb",
        why: NOT_PASSED,
    },
    Difference {
        case: "open.direct-misaligned",
        host: "ok EINVAL EINVAL 0",
        share: "ok 100 4096 4096",
        why: "the guest keeps nothing of such a file, but the host may, and so it demands no alignment",
    },
    Difference {
        case: "open.tmpfile",
        host: "ok 6 hidden file,0600,6,0link empty",
        share: "EOPNOTSUPP not-open not-open not-open empty",
        why: UNSERVED,
    },
    Difference {
        case: "open.tmpfile-excl",
        host: "ok ENOENT empty",
        share: "EOPNOTSUPP not-open empty",
        why: UNSERVED,
    },
    Difference {
        case: "open.tmpfile-linked",
        host: "ok 3 ok now 0640,1link 1link",
        share: "EOPNOTSUPP not-open not-open ENOENT ENOENT not-open",
        why: UNSERVED,
    },
    Difference {
        case: "xattr.security",
        host: "ok v EPERM",
        share: "EPERM ENODATA EPERM",
        why: ADMINISTRATORS,
    },
    Difference {
        case: "xattr.trusted",
        host: "ok v trusted.x ENODATA EPERM none",
        share: "EPERM ENODATA none ENODATA EPERM none",
        why: ADMINISTRATORS,
    },
    Difference { case: "xattr.trusted-on-fifo", host: "ok v", share: "EPERM ENODATA", why: ADMINISTRATORS },
    Difference {
        case: "xattr.trusted-on-symlink",
        host: "ok v trusted.x",
        share: "EPERM ENODATA none",
        why: ADMINISTRATORS,
    },
];

/// And where the guest may remember nothing.
pub const UNCACHED: &[Difference] = &[Difference {
    case: "data.write-at-the-limit",
    host: "1 17592186040320 EFBIG 17592186040320",
    share: "EFBIG 17592186040320 EFBIG 17592186040320",
    why: "what cannot be written any more is told instead of what was",
}];

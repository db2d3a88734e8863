//! What a container is to its machine: alone in it, the sandbox of a pod, or a member of one.

use std::collections::HashMap;

/// What a container is to its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// It has a machine of its own.
    Single,
    /// It is the pod's first container, whose namespaces the others share.
    Sandbox,
    /// It joins the machine of a pod, or of another container whose network it shares.
    Member {
        /// The pod's sandbox, or that container.
        pod: String,
    },
}

/// Which annotation says what a container is, and which its pod: of CRI in containerd, and in CRI-O.
const CRI: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// The annotation by which clients other than CRI put containers together.
const GROUP: &str = "io.containerd.runc.v2.group";

impl Kind {
    /// What the annotations of container `id` say.
    pub fn of(id: &str, annotations: Option<&HashMap<String, String>>) -> Kind {
        let get = |key: &str| annotations.and_then(|all| all.get(key)).filter(|value| !value.is_empty());
        for (kind, sandbox) in CRI {
            match (get(kind).map(String::as_str), get(sandbox)) {
                (Some("sandbox"), _) => return Kind::Sandbox,
                (Some("container"), Some(pod)) => return Kind::Member { pod: pod.clone() },
                _ => {}
            }
        }
        match get(GROUP).or_else(|| get(CRI[0].1)) {
            Some(group) if group == id => Kind::Sandbox,
            Some(group) => Kind::Member { pod: group.clone() },
            None => Kind::Single,
        }
    }

    /// The name that containers of one machine have in common, if they can be several.
    pub fn group<'a>(&'a self, id: &'a str) -> Option<&'a str> {
        match self {
            Kind::Single => None,
            Kind::Sandbox => Some(id),
            Kind::Member { pod } => Some(pod),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let member = |pod: &str| Kind::Member { pod: pod.to_owned() };
        let cases: &[(&[(&str, &str)], Kind)] = &[
            (&[], Kind::Single),
            (&[("io.kubernetes.cri.container-type", "sandbox")], Kind::Sandbox),
            (
                &[("io.kubernetes.cri.container-type", "sandbox"), ("io.kubernetes.cri.sandbox-id", "c1")],
                Kind::Sandbox,
            ),
            (
                &[("io.kubernetes.cri.container-type", "container"), ("io.kubernetes.cri.sandbox-id", "p1")],
                member("p1"),
            ),
            (&[("io.kubernetes.cri.sandbox-id", "p1")], member("p1")),
            (
                &[
                    ("io.kubernetes.cri-o.ContainerType", "container"),
                    ("io.kubernetes.cri-o.SandboxID", "p2"),
                ],
                member("p2"),
            ),
            (&[("io.containerd.runc.v2.group", "g")], member("g")),
            (&[("io.containerd.runc.v2.group", "c1")], Kind::Sandbox),
            (&[("io.containerd.runc.v2.group", "")], Kind::Single),
        ];
        for (annotations, kind) in cases {
            let map = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(Kind::of("c1", Some(&map)), *kind, "{annotations:?}");
        }
        assert_eq!(member("p").group("c"), Some("p"));
        assert_eq!(Kind::Sandbox.group("c"), Some("c"));
        assert_eq!(Kind::Single.group("c"), None);
    }
}

//! Devices: those that every Linux has are the guest's own, disks of the host become disks of the machine,
//! and there are no others.
//!
//! A privileged container comes with a list of every device of the host, and the rule that it may use all.
//! Of such a list the container gets what the guest has; the rest, disks included, is left out and noted
//! (`policy.privileged_devices`). Without that rule somebody has asked for this one device, and gets it or an
//! error.

use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Type};

use crate::config::Absent;
use crate::error::{Result, at, invalid, unsupported};
use crate::plan::{Block, BlockSource, GuestDevice, Note, Plan};
use crate::planner::Context;

/// A character device of the guest's kernel.
struct Own {
    path: &'static str,
    major: i64,
    minor: i64,
    /// Whether every container has it without asking.
    always: bool,
}

const fn own(path: &'static str, major: i64, minor: i64, always: bool) -> Own {
    Own { path, major, minor, always }
}

const OWN: &[Own] = &[
    own("/dev/null", 1, 3, true),
    own("/dev/zero", 1, 5, true),
    own("/dev/full", 1, 7, true),
    own("/dev/random", 1, 8, true),
    own("/dev/urandom", 1, 9, true),
    own("/dev/tty", 5, 0, true),
    own("/dev/console", 5, 1, true),
    own("/dev/ptmx", 5, 2, true),
    own("/dev/kmsg", 1, 11, false),
    own("/dev/hwrng", 10, 183, false),
    own("/dev/net/tun", 10, 200, false),
    own("/dev/fuse", 10, 229, false),
];

/// Pseudo terminals, whose minor numbers come and go.
const PTS: i64 = 136;

/// The guest's own device of these numbers, by the path at which the guest has it.
pub(crate) fn own_path(major: i64, minor: i64) -> Option<&'static str> {
    OWN.iter().find(|own| (own.major, own.minor) == (major, minor)).map(|own| own.path)
}

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(linux) = plan.guest.spec.linux_mut() else { return Ok(()) };
    let asked = linux.devices_mut().take().unwrap_or_default();
    let given = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().take());
    let given_rules = given.clone().unwrap_or_default();
    let privileged = given_rules.iter().any(allows_all);
    let mut kept = Vec::new();
    let mut left_out = Vec::new();
    for (index, device) in asked.into_iter().enumerate() {
        let place = at("linux.devices", index);
        if !device.path().is_absolute() || device.path().components().any(|part| part.as_os_str() == "..") {
            return Err(invalid(place, device.path().display(), "the path of a device is absolute"));
        }
        match fate(&device) {
            Fate::Made => {}
            Fate::Kept => kept.push(device),
            Fate::Disk if !privileged => disk(context, plan, &place, &device, &given_rules)?,
            Fate::Nonsense => {
                return Err(invalid(place, device.path().display(), "this is no type of a device"));
            }
            Fate::Disk | Fate::Absent if privileged => {
                match context.settings.config.policy.privileged_devices {
                    Absent::Omit => left_out.push(device.path().display().to_string()),
                    Absent::Reject => return Err(absent(place, &device)),
                }
            }
            Fate::Disk | Fate::Absent => return Err(absent(place, &device)),
        }
    }
    if let Some(first) = left_out.first() {
        let text =
            format!("{} devices of the host are not in the guest, {first} the first of them", left_out.len());
        plan.notes.push(Note::new("linux.devices", text));
    }
    let rules = given.map(|given| rules("linux.resources", given, &mut plan.notes));
    if let Some(linux) = plan.guest.spec.linux_mut() {
        linux.set_devices((!kept.is_empty()).then_some(kept));
        if let (Some(resources), Some(rules)) = (linux.resources_mut(), rules) {
            resources.set_devices(Some(rules));
        }
    }
    Ok(())
}

/// What becomes of a device.
enum Fate {
    /// Every container has it.
    Made,
    /// The guest has it.
    Kept,
    /// It is a disk of the host's.
    Disk,
    /// The guest does not have it.
    Absent,
    /// There is no such thing.
    Nonsense,
}

fn fate(device: &LinuxDevice) -> Fate {
    match device.typ() {
        Type::A => Fate::Nonsense,
        Type::P => Fate::Kept,
        Type::B => Fate::Disk,
        Type::C | Type::U => {
            let own = OWN.iter().find(|own| (own.major, own.minor) == (device.major(), device.minor()));
            match own {
                Some(own) if own.always && device.path() == Path::new(own.path) => Fate::Made,
                Some(_) => Fate::Kept,
                None if device.major() == PTS => Fate::Made,
                None => Fate::Absent,
            }
        }
    }
}

fn absent(place: String, device: &LinuxDevice) -> crate::Error {
    let why = match (device.typ(), device.path().to_str()) {
        (_, Some("/dev/kvm")) => "guests are not given virtualization",
        (Type::B, _) => "this is a disk of the host, and policy.privileged_devices says no",
        _ => "devices of the host are not in a guest, and the guest has none of these numbers",
    };
    let asked = format!("{} ({}:{})", device.path().display(), device.major(), device.minor());
    unsupported(place, asked, why, "leave it out")
}

fn disk(
    context: &Context<'_>,
    plan: &mut Plan,
    place: &str,
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<()> {
    let (major, minor) = (device.major(), device.minor());
    // The last rule that is about the device holds, as it does in the kernel.
    let of_device = |rule: &&LinuxDeviceCgroup| {
        matches!(rule.typ(), None | Some(Type::A | Type::B))
            && number(rule.major()).is_none_or(|number| number == major)
            && number(rule.minor()).is_none_or(|number| number == minor)
            && (!rule.allow() || rule.access().as_deref().unwrap_or("rwm") != "m")
    };
    let access = match rules.iter().rfind(of_device) {
        Some(rule) if rule.allow() => rule.access().clone().unwrap_or_else(|| "rwm".to_owned()),
        Some(_) => {
            let asked = device.path().display();
            return Err(invalid(place, asked, "its device cgroup does not allow any use of it"));
        }
        None => "rwm".to_owned(),
    };
    let serial = next_serial(context, plan);
    let readonly = !access.contains('w');
    plan.blocks.push(Block {
        serial: serial.clone(),
        source: BlockSource::Device { major, minor },
        readonly,
    });
    plan.guest.devices.push(GuestDevice {
        serial,
        path: device.path().clone(),
        mode: device.file_mode(),
        uid: device.uid(),
        gid: device.gid(),
        access,
    });
    Ok(())
}

/// The serial number of the next disk: no two of a machine have the same.
pub(crate) fn next_serial(context: &Context<'_>, plan: &Plan) -> String {
    format!("c{}b{}", context.request.ordinal, plan.blocks.len())
}

fn number(number: Option<i64>) -> Option<i64> {
    number.filter(|number| *number >= 0)
}

fn allows_all(rule: &LinuxDeviceCgroup) -> bool {
    let access = rule.access().as_deref().unwrap_or("rwm");
    rule.allow()
        && matches!(rule.typ(), None | Some(Type::A))
        && number(rule.major()).is_none()
        && number(rule.minor()).is_none()
        && "rwm".chars().all(|letter| access.contains(letter))
}

/// Rules of the device cgroup as the guest is told of them.
///
/// Numbers of disks are the host's and mean others in the guest, where the agent adds its own. The same goes
/// for character devices that the guest does not have. Rules about all devices, and prohibitions, stay.
pub(crate) fn rules(
    at: &str,
    given: Vec<LinuxDeviceCgroup>,
    notes: &mut Vec<Note>,
) -> Vec<LinuxDeviceCgroup> {
    let all = given.len();
    let kept: Vec<_> = given
        .into_iter()
        .filter(|rule| match (rule.typ(), number(rule.major()), number(rule.minor())) {
            (_, None, _) => true,
            (Some(Type::B), ..) => false,
            _ if !rule.allow() => true,
            (_, Some(PTS), _) => true,
            (_, Some(major), Some(minor)) => own_path(major, minor).is_some(),
            (_, Some(_), None) => false,
        })
        .collect();
    if kept.len() < all {
        let text = format!("{} rules are about devices of the host, and left out", all - kept.len());
        notes.push(Note::new(format!("{at}.devices"), text));
    }
    kept
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Case;

    fn device(path: &str, typ: &str, major: i64, minor: i64) -> Value {
        json!({ "path": path, "type": typ, "major": major, "minor": minor, "fileMode": 432, "uid": 0, "gid": 6 })
    }

    fn rule(allow: bool, typ: &str, major: i64, minor: i64, access: &str) -> Value {
        json!({ "allow": allow, "type": typ, "major": major, "minor": minor, "access": access })
    }

    fn case(devices: &Value, rules: &Value) -> Case {
        Case::with(&json!({ "linux": { "devices": devices, "resources": { "devices": rules } } }))
    }

    fn in_guest(plan: &Plan) -> Vec<String> {
        let devices = plan.guest.spec.linux().as_ref().unwrap().devices().clone().unwrap_or_default();
        devices.iter().map(|device| device.path().display().to_string()).collect()
    }

    #[test]
    fn the_guests_own() {
        let devices = json!([
            device("/dev/null", "c", 1, 3),
            device("/dev/tty", "c", 5, 0),
            device("/dev/pts/3", "c", 136, 3),
            device("/dev/nothing", "c", 1, 3),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/net/tun", "u", 10, 200),
            device("/pipe", "p", 0, 0),
        ]);
        let plan = case(&devices, &json!([])).plan();
        assert_eq!(in_guest(&plan), ["/dev/nothing", "/dev/fuse", "/dev/net/tun", "/pipe"]);
    }

    #[test]
    fn single_devices_that_no_guest_has() {
        for (device, word) in [
            (device("/dev/nvidia0", "c", 195, 0), "195:0"),
            (device("/dev/kvm", "c", 10, 232), "virtualization"),
            (device("/dev/a", "a", 0, 0), "type"),
            (device("dev/null", "c", 1, 3), "absolute"),
            (device("/dev/../x", "c", 1, 3), "absolute"),
        ] {
            let error = case(&json!([device]), &json!([])).error();
            assert_eq!(error.path(), "linux.devices[0]");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn disks() {
        let disk = json!([device("/dev/xvda", "b", 8, 16)]);
        for (rules, access, readonly) in [
            (json!([]), "rwm", false),
            (json!([{ "allow": false, "access": "rwm" }, rule(true, "b", 8, 16, "rwm")]), "rwm", false),
            (json!([{ "allow": false, "access": "rwm" }, rule(true, "b", 8, 16, "r")]), "r", true),
            (
                json!([{ "allow": false }, rule(true, "b", 8, 16, "rw"), rule(true, "b", -1, -1, "m")]),
                "rw",
                false,
            ),
        ] {
            let plan = case(&disk, &rules).plan();
            let source = BlockSource::Device { major: 8, minor: 16 };
            assert_eq!(plan.blocks, [Block { serial: "c0b0".to_owned(), source, readonly }], "{rules}");
            let expected = json!([{ "serial": "c0b0", "path": "/dev/xvda", "mode": 432, "uid": 0, "gid": 6,
                "access": access }]);
            assert_eq!(serde_json::to_value(plan.guest.devices).unwrap(), expected);
        }
        let denied = json!([{ "allow": false, "access": "rwm" }]);
        assert_eq!(case(&disk, &denied).error().path(), "linux.devices[0]");
    }

    #[test]
    fn privileged_containers() {
        let devices = json!([
            device("/dev/sda", "b", 8, 0),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/kvm", "c", 10, 232)
        ]);
        let mut case = case(&devices, &json!([{ "allow": true, "access": "rwm" }]));
        let plan = case.plan();
        assert_eq!((in_guest(&plan), plan.blocks), (vec!["/dev/fuse".to_owned()], vec![]));
        assert_eq!(plan.notes.len(), 1);
        assert!(plan.notes[0].text.starts_with("2 devices"));
        case.config.policy.privileged_devices = Absent::Reject;
        assert_eq!(case.error().path(), "linux.devices[0]");
    }

    #[test]
    fn rules_mean_the_same_in_the_guest() {
        let kept = json!([
            { "allow": false, "access": "rwm" },
            rule(true, "c", -1, -1, "m"),
            rule(true, "c", 1, 3, "rwm"),
            rule(true, "c", 136, -1, "rwm"),
            rule(false, "c", 10, 232, "rwm"),
        ]);
        let mut given = kept.as_array().unwrap().clone();
        given.push(rule(true, "c", 195, -1, "rw"));
        given.push(rule(true, "c", 10, 232, "rw"));
        given.push(rule(true, "b", 8, 0, "r"));
        let plan = case(&json!([]), &json!(given)).plan();
        let rules = plan.guest.spec.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone();
        assert_eq!(
            serde_json::to_value(rules).unwrap(),
            serde_json::to_value(serde_json::from_value::<Vec<LinuxDeviceCgroup>>(kept).unwrap()).unwrap()
        );
        assert!(plan.notes[0].text.starts_with("3 rules"), "{:?}", plan.notes);
    }
}

//! What this module needs of a host, one finding after the other.

use std::io;
use std::path::Path;

use kvm_ioctls::Cap;

use super::super::check::{self, Finding, Host, ProcessorFlags};
use super::super::{Error, Hypervisor};
use super::{API_VERSION, Kvm};

const PROCESSOR: &str = "processor";
const DEVICE: &str = "device";
const PERMISSION: &str = "permission";
const INTERFACE: &str = "interface";
const CAPABILITIES: &str = "capabilities";
const GUEST: &str = "guest";

/// Capabilities without which a machine cannot be built, and what for.
const COMMON: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest RAM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping a vCPU without a race"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "queue notifications"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "device interrupts"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "parked vCPUs in snapshots"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "pending exceptions in snapshots"),
];

#[cfg(target_arch = "x86_64")]
const NATIVE: &[(Cap, &str, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "the interrupt controller"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "the processor model"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "real mode on older Intel processors"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "real mode on older Intel processors"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "the guest's timer"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "the guest's clock in snapshots"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "vector registers in snapshots"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "vector registers in snapshots"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "debug registers in snapshots"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ", "the clock rate in snapshots"),
];

#[cfg(target_arch = "aarch64")]
const NATIVE: &[(Cap, &str, &str)] = &[
    (Cap::OneReg, "KVM_CAP_ONE_REG", "registers"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2", "starting and stopping vCPUs"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL", "the interrupt controller"),
];

/// Looks at a host. Later findings are skipped when an earlier one makes them meaningless; a
/// processor without virtualization is no such reason, since what the device does all the same is
/// worth knowing.
pub(in super::super) fn findings(host: &Host) -> Vec<Finding> {
    let mut found = Vec::new();
    if cfg!(target_arch = "x86_64") {
        found.push(processor(&host.flags));
    }
    if let Err(failed) = device(&host.device, &mut found) {
        for name in [DEVICE, PERMISSION, INTERFACE, CAPABILITIES, GUEST] {
            if !found.iter().any(|finding| finding.name == name) {
                found.push(Finding::skipped(name, failed));
            }
        }
    }
    found
}

fn processor(flags: &ProcessorFlags) -> Finding {
    const MEND: &str = "turn on virtualization (VT-x or AMD-V) in the firmware's setup; inside a virtual \
                        machine, turn on nested virtualization for it";
    match flags {
        ProcessorFlags::Known(flags) => match flags.iter().find(|flag| *flag == "svm" || *flag == "vmx") {
            Some(flag) => Finding::ok(PROCESSOR, format!("{flag}: it can run guests")),
            None => Finding::fail(
                PROCESSOR,
                "neither svm nor vmx among its flags: a KVM that answers here is one in software, which \
                 cannot run stock kernels",
                MEND,
            ),
        },
        ProcessorFlags::Unknown(why) => Finding::fail(PROCESSOR, why.as_str(), "mount /proc"),
    }
}

/// Goes on until something fails, and says the name of that.
fn device(path: &Path, found: &mut Vec<Finding>) -> Result<(), &'static str> {
    let node = path.display();
    match path.metadata() {
        Ok(_) => found.push(Finding::ok(DEVICE, format!("{node} is there"))),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            found.push(Finding::fail(DEVICE, format!("{node}: {error}"), "let this user into the directory"));
            return Err(DEVICE);
        }
        Err(error) => {
            found.push(Finding::fail(DEVICE, format!("{node}: {error}"), no_device_mend()));
            return Err(DEVICE);
        }
    }

    let kvm = match Kvm::open(path) {
        Ok(kvm) => kvm,
        Err(Error::Open { source, .. }) => {
            found.push(Finding::fail(PERMISSION, format!("{node}: {source}"), open_mend(path, &source)));
            return Err(PERMISSION);
        }
        Err(other) => {
            found.push(Finding::ok(PERMISSION, format!("{node} opens for reading and writing")));
            found.push(Finding::fail(
                INTERFACE,
                other.to_string(),
                format!("give the path of KVM's device node, {}", super::DEVICE),
            ));
            return Err(INTERFACE);
        }
    };
    found.push(Finding::ok(PERMISSION, format!("{node} opens for reading and writing")));
    found.push(Finding::ok(INTERFACE, format!("version {API_VERSION}")));

    let missing: Vec<_> =
        COMMON.iter().chain(NATIVE).filter(|(cap, ..)| !kvm.fd.check_extension(*cap)).collect();
    if missing.is_empty() {
        found
            .push(Finding::ok(CAPABILITIES, format!("all {} needed are there", COMMON.len() + NATIVE.len())));
    } else {
        let list: Vec<_> = missing.iter().map(|(_, name, purpose)| format!("{name} ({purpose})")).collect();
        found.push(Finding::fail(
            CAPABILITIES,
            format!("missing: {}", list.join(", ")),
            "use a newer host kernel, 5.10 or later",
        ));
        return Err(CAPABILITIES);
    }

    guest(&kvm, found)
}

fn guest<H: Hypervisor>(hypervisor: &H, found: &mut Vec<Finding>) -> Result<(), &'static str> {
    match check::probe(hypervisor) {
        Ok(()) => {
            found.push(Finding::ok(GUEST, "a guest of a few instructions ran and was stopped"));
            Ok(())
        }
        Err(error) => {
            found.push(Finding::fail(
                GUEST,
                format!("a guest of a few instructions: {error}"),
                "see the kernel's log (dmesg) for what KVM says; another user of the virtualization \
                 hardware may hold it",
            ));
            Err(GUEST)
        }
    }
}

fn no_device_mend() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "use a host kernel with CONFIG_KVM that was started in EL2; in a container, pass the device into it"
    } else {
        "load the module kvm_intel or kvm_amd; in a container, pass the device into it"
    }
}

fn open_mend(path: &Path, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            format!("add the user to the group of {} (mostly kvm) and log in again", path.display())
        }
        _ => format!("see whether {} is a device node and its driver is loaded", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::super::super::check::Outcome;
    use super::*;

    fn flags(words: &[&str]) -> ProcessorFlags {
        ProcessorFlags::Known(words.iter().map(ToString::to_string).collect())
    }

    fn outcome(report: &check::Report, name: &str) -> Outcome {
        report.findings.iter().find(|finding| finding.name == name).unwrap().outcome
    }

    fn report(device: PathBuf, words: &[&str]) -> check::Report {
        check::host(&Host { device, flags: flags(words) })
    }

    /// A path that no other test and no other run uses.
    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vmm-ability-{}-{name}", std::process::id()))
    }

    #[test]
    fn no_kvm() {
        let report = report("/nonexistent/kvm".into(), &["svm"]);
        assert!(!report.usable());
        assert_eq!(outcome(&report, DEVICE), Outcome::Fail);
        assert_eq!(outcome(&report, GUEST), Outcome::Skipped);
        assert!(report.verdict().contains("/nonexistent/kvm"), "{}", report.verdict());
    }

    #[test]
    fn no_permission() {
        let path = scratch("no-permission");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        let readable = fs::File::open(&path).is_ok();
        let report = report(path.clone(), &["svm"]);
        fs::remove_file(&path).unwrap();
        // The superuser is never denied; for it, this is a node that is not KVM's.
        let failed = if readable { INTERFACE } else { PERMISSION };
        assert_eq!(outcome(&report, failed), Outcome::Fail, "{report}");
        assert_eq!(outcome(&report, GUEST), Outcome::Skipped);
        assert!(!report.usable());
    }

    #[test]
    fn permission_is_mended_by_the_group_and_other_errors_by_the_driver() {
        let kvm = Path::new("/dev/kvm");
        for (errno, word) in [(libc::EACCES, "group"), (libc::EPERM, "group"), (libc::ENXIO, "driver")] {
            let mend = open_mend(kvm, &io::Error::from_raw_os_error(errno));
            assert!(mend.contains(word), "{mend}");
        }
    }

    #[test]
    fn something_else_at_the_path() {
        let report = report("/dev/null".into(), &["vmx"]);
        assert_eq!(outcome(&report, INTERFACE), Outcome::Fail, "{report}");
        assert!(!report.usable());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_kvm_in_software_is_not_usable_whatever_its_device_does() {
        let report = report(super::super::DEVICE.into(), &["fpu", "sse2"]);
        assert_eq!(outcome(&report, PROCESSOR), Outcome::Fail);
        assert!(!report.usable());
        assert!(report.verdict().contains("svm"), "{}", report.verdict());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn either_vendor_will_do() {
        for (words, expected) in [
            (&["fpu", "svm"][..], Outcome::Ok),
            (&["fpu", "vmx"][..], Outcome::Ok),
            (&["fpu", "svme", "avmx"][..], Outcome::Fail),
            (&[][..], Outcome::Fail),
        ] {
            assert_eq!(processor(&flags(words)).outcome, expected, "{words:?}");
        }
        assert_eq!(processor(&ProcessorFlags::Unknown("x".into())).outcome, Outcome::Fail);
    }
}

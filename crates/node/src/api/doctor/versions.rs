//! Versions of what stands between a guest and the host, against a dated list of faults that were repaired since.

use peer_compute::engine::EngineFacts;
use peer_proto::control::Finding;

use super::{Examined, failure, note, ok, warning};

/// When the lists below were last compared with what is published.
const LISTED_ON: &str = "2026-08-20";

/// A published fault that lets a guest, or a user of the host, beyond what it was given.
struct Fault {
    /// Its name, and what it opens.
    name: &'static str,
    /// First repaired version of each line of releases, ascending. What is newer than the last is repaired, too.
    repaired: &'static [Version],
}

/// Major, minor, patch.
type Version = [u32; 3];

const RUNC: &[Fault] = &[
    Fault { name: "CVE-2019-5736, a guest overwrites runc on the host", repaired: &[[1, 0, 0]] },
    Fault { name: "CVE-2021-30465, a race of mounts reaches the host's files", repaired: &[[1, 0, 0]] },
    Fault { name: "CVE-2024-21626, a leaked descriptor reaches the host's files", repaired: &[[1, 1, 12]] },
    Fault { name: "CVE-2024-45310, empty files are made on the host", repaired: &[[1, 1, 14], [1, 2, 0]] },
    Fault {
        name: "CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881, masked files of the kernel are written",
        repaired: &[[1, 2, 8], [1, 3, 3], [1, 4, 0]],
    },
];

const CONTAINERD: &[Fault] = &[
    Fault { name: "CVE-2020-15257, a shim is reached from a container", repaired: &[[1, 3, 9], [1, 4, 3]] },
    Fault { name: "CVE-2021-41103, users of the host read containers' files", repaired: &[[1, 4, 11], [1, 5, 7]] },
    Fault { name: "CVE-2024-40635, a huge user id becomes root", repaired: &[[1, 6, 38], [1, 7, 27], [2, 0, 4]] },
    Fault {
        name: "CVE-2024-25621, users of the host read containers' files",
        repaired: &[[1, 7, 29], [2, 0, 7], [2, 1, 5], [2, 2, 0]],
    },
];

const ENGINE: &[Fault] = &[
    Fault { name: "CVE-2021-41091, users of the host run containers' files", repaired: &[[20, 10, 9]] },
    Fault { name: "CVE-2022-24769, processes begin with inheritable capabilities", repaired: &[[20, 10, 14]] },
    Fault { name: "CVE-2022-36109, groups of the image's user are not as they should be", repaired: &[[20, 10, 18]] },
    Fault {
        name: "CVE-2024-29018, names are resolved out of internal networks",
        repaired: &[[23, 0, 11], [25, 0, 5], [26, 0, 0]],
    },
];

const KERNEL: &[Fault] = &[
    Fault {
        name: "CVE-2022-0847 (Dirty Pipe), read-only files are written",
        repaired: &[[5, 10, 102], [5, 15, 25], [5, 16, 11]],
    },
    Fault {
        name: "CVE-2024-1086, the packet filter gives root",
        repaired: &[[5, 10, 210], [5, 15, 149], [6, 1, 76], [6, 6, 15], [6, 7, 3]],
    },
];

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    let Some(Ok(facts)) = &examined.engine else { return Vec::new() };
    judge(facts)
}

fn judge(facts: &EngineFacts) -> Vec<Finding> {
    let texts = [&facts.version, &facts.runc_version, &facts.containerd_version];
    // Of the parts that a distribution builds, not all say so.
    let origin = if texts.iter().any(|text| is_of_distribution(text)) { Origin::Distribution } else { Origin::Author };
    vec![
        program("engine_version", "the container engine", &facts.version, ENGINE, origin),
        program("runc_version", "runc", &facts.runc_version, RUNC, origin),
        program("containerd_version", "containerd", &facts.containerd_version, CONTAINERD, origin),
        kernel(&facts.kernel_version),
    ]
}

/// Who built the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Those who write them: a repair has a new number.
    Author,
    /// A distribution, which repairs a fault and leaves the number as it was.
    Distribution,
}

fn is_of_distribution(text: &str) -> bool {
    parse(text).is_some_and(|(_, rest)| !rest.is_empty() && !is_candidate(rest))
}

fn is_candidate(rest: &str) -> bool {
    ["-rc", "-beta", "-alpha"].iter().any(|stage| rest.starts_with(stage))
}

/// Reads `1.1.5+ds1-1+deb12u1`, `v1.2.0-rc.1` or `6.1.0-25-amd64`: the numbers, and what follows them.
fn parse(text: &str) -> Option<(Version, &str)> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let mut numbers = text[..end].trim_end_matches('.').split('.').map(str::parse);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
    Some(([major, minor, patch], &text[end..]))
}

fn is_repaired(fault: &Fault, version: Version, rest: &str) -> bool {
    // A release candidate comes before its release.
    let reached = |repaired: &Version| version > *repaired || (version == *repaired && !is_candidate(rest));
    fault.repaired.last().is_some_and(reached)
        || fault.repaired.iter().any(|repaired| repaired[..2] == version[..2] && reached(repaired))
}

/// The faults that the version has by its number.
fn faults_of(list: &[Fault], version: Version, rest: &str) -> Option<String> {
    let open = list.iter().filter(|fault| !is_repaired(fault, version, rest)).map(|fault| fault.name);
    Some(open.collect::<Vec<_>>().join("; ")).filter(|names| !names.is_empty())
}

fn program(check: &str, what: &str, text: &str, list: &[Fault], origin: Origin) -> Finding {
    let Some((version, rest)) = parse(text) else {
        let message = format!("the engine does not say which version of {what} it has");
        return note(check, message, format!("look yourself whether it is old: faults are listed up to {LISTED_ON}"));
    };
    let Some(faults) = faults_of(list, version, rest) else {
        return ok(check, format!("{what} {text} has none of the faults listed up to {LISTED_ON}"));
    };
    let message = format!("{what} {text} is old: {faults}");
    if origin == Origin::Author {
        return failure(check, message, format!("update {what}: a guest may get out of its container"));
    }
    let advice = "it is a distribution's build, which may hold the repairs under the old number: install all security updates, \
                  and look for these names in the package's changelog";
    warning(check, message, advice)
}

fn kernel(text: &str) -> Finding {
    const CHECK: &str = "kernel_version";
    /// Older lines of releases get no repairs any more.
    const MAINTAINED: Version = [5, 10, 0];
    let Some((version, rest)) = parse(text) else {
        return note(CHECK, "the engine does not say which kernel it runs on", "look yourself whether it is old");
    };
    let advice = "install its security updates, and restart the machine after each new kernel";
    match (version < MAINTAINED, version[2] == 0 && !rest.is_empty()) {
        (true, true) => {
            let message = format!("the kernel {text} is of an old line; only its distribution may still repair it");
            return warning(CHECK, message, advice);
        }
        (true, false) => {
            let message = format!("the kernel {text} is of a line that gets no repairs any more");
            return failure(CHECK, message, "update the system: the kernel is the wall between guests and host");
        }
        (false, true) => {
            let message = format!("the kernel {text} is a distribution's, whose number does not tell what is repaired");
            return note(CHECK, message, advice);
        }
        (false, false) => {}
    }
    match faults_of(KERNEL, version, rest) {
        None => ok(CHECK, format!("the kernel {text} has none of the faults listed up to {LISTED_ON}")),
        Some(faults) => {
            failure(CHECK, format!("the kernel {text} is old: {faults}"), "update it, and restart the machine")
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use peer_proto::control::Level;

    use super::*;

    /// An engine as it should be.
    pub(in super::super) fn facts() -> EngineFacts {
        EngineFacts {
            version: "28.4.0".into(),
            kernel_version: "6.12.43".into(),
            runc_version: "1.3.3".into(),
            containerd_version: "v1.7.29".into(),
            security_options: vec!["name=seccomp,profile=builtin".into()],
            seccomp: true,
            apparmor: true,
            cgroup_version: 2,
            runtime: "runc".into(),
            runtimes: vec!["runc".into()],
            live_restore: true,
            ..EngineFacts::default()
        }
    }

    #[test]
    fn versions_of_every_shape_are_read() {
        assert_eq!(parse("1.1.5+ds1-1+deb12u1"), Some(([1, 1, 5], "+ds1-1+deb12u1")));
        assert_eq!(parse("v1.7.27"), Some(([1, 7, 27], "")));
        assert_eq!(parse("1.2.0-rc.1"), Some(([1, 2, 0], "-rc.1")));
        assert_eq!(parse("6.18.44-fc-v657"), Some(([6, 18, 44], "-fc-v657")));
        assert_eq!(parse("27.1"), Some(([27, 1, 0], "")));
        for nothing in ["", "v", "dev", "abc123", "1", "99999999999.1.1"] {
            assert_eq!(parse(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_version_is_repaired_in_its_own_line_or_after_the_last() {
        let finding = |version: &str| program("runc_version", "runc", version, RUNC, Origin::Author);
        let level = |version: &str| finding(version).level;
        for old in ["1.0.3", "1.1.11", "1.1.12", "1.1.15", "1.2.7", "1.3.0", "1.3.2", "1.4.0-rc.2"] {
            assert_eq!(level(old), Level::Failure, "{old}");
        }
        for new in ["1.2.8", "1.2.9", "1.3.3", "1.4.0", "1.4.1-rc.1", "2.0.0"] {
            assert_eq!(level(new), Level::Ok, "{new}");
        }
        assert!(finding("1.1.11").message.contains("CVE-2024-21626"));
        assert!(!finding("1.1.12").message.contains("CVE-2024-21626"));
    }

    #[test]
    fn a_distributions_old_number_is_a_warning_and_no_version_a_note() {
        let debian = EngineFacts {
            version: "20.10.24+dfsg1".into(),
            runc_version: "1.1.5+ds1-1+deb12u1".into(),
            containerd_version: "1.6.20~ds1-1+deb12u3".into(),
            ..facts()
        };
        let ubuntu = EngineFacts { version: "24.0.7".into(), runc_version: "1.1.7-0ubuntu1".into(), ..facts() };
        let author = EngineFacts { version: "24.0.7".into(), runc_version: "1.1.7".into(), ..facts() };
        let levels = |facts: &EngineFacts| -> Vec<_> { judge(facts).iter().map(|finding| finding.level).collect() };
        assert_eq!(levels(&debian)[..3], [Level::Warning; 3]);
        assert_eq!(levels(&ubuntu)[..2], [Level::Warning; 2]);
        assert_eq!(levels(&author)[..2], [Level::Failure; 2]);
        assert_eq!(levels(&EngineFacts { runc_version: String::new(), ..facts() })[1], Level::Note);
    }

    #[test]
    fn old_kernels_are_named_and_a_distributions_number_is_not_believed() {
        for (text, level) in [
            ("4.19.300", Level::Failure),
            ("5.9.16", Level::Failure),
            ("5.10.101", Level::Failure),
            ("5.10.210", Level::Ok),
            ("5.12.3", Level::Failure),
            ("6.1.75", Level::Failure),
            ("6.1.76", Level::Ok),
            ("6.7.2", Level::Failure),
            ("6.18.44-fc-v657", Level::Ok),
            ("6.1.0-25-amd64", Level::Note),
            ("5.15.0-100-generic", Level::Note),
            ("4.18.0-553.el8_10.x86_64", Level::Warning),
            ("", Level::Note),
        ] {
            assert_eq!(kernel(text).level, level, "{text}");
        }
    }

    #[test]
    fn every_list_ascends_and_a_good_engine_has_no_fault() {
        for list in [RUNC, CONTAINERD, ENGINE, KERNEL] {
            assert!(list.iter().all(|fault| fault.repaired.is_sorted() && !fault.repaired.is_empty()));
        }
        assert!(judge(&facts()).iter().all(|finding| finding.level == Level::Ok));
    }
}

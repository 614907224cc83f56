//! What the kernel says of a process: memory, processor time, descriptors, network namespaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use crate::Failure;

/// The unit of times in /proc, the same for every program on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Resident memory of a process (bytes).
pub(crate) fn resident(process: u32) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS in /proc")?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes * 1024)
}

/// Processor time that a process has used, its own and the kernel's for it (seconds).
pub(crate) fn processor_seconds(process: u32) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The program's name stands in parentheses and may hold anything; user and system time are fields 14 and 15.
    let rest = stat.rsplit_once(')').ok_or("no name in /proc/PID/stat")?.1;
    let fields: Vec<_> = rest.split_ascii_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u32>().ok()).map(f64::from);
    let (user, system) = (ticks(11).ok_or("no user time")?, ticks(12).ok_or("no system time")?);
    Ok((user + system) / TICKS_PER_SECOND)
}

/// What each open descriptor of a process is.
pub(crate) fn descriptors(process: u32) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        match fs::read_link(entry?.path()) {
            Ok(link) => all.push(link.to_string_lossy().into_owned()),
            // Closed since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    all.sort();
    Ok(all)
}

/// Every network namespace that anything holds, with who holds it.
pub(crate) fn network_namespaces() -> Result<BTreeMap<String, BTreeSet<String>>, Failure> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(process) = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else { continue };
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let holder = format!("process {process} ({})", name.trim());
        let mut links = vec![path.join("ns/net")];
        links.extend(fs::read_dir(path.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path()));
        for link in links {
            if let Some(namespace) = namespace_at(&link) {
                all.entry(namespace).or_default().insert(holder.clone());
            }
        }
    }
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        if let [_, _, _, root, mounted, ..] = fields[..]
            && root.starts_with("net:[")
        {
            all.entry(root.to_owned()).or_default().insert(format!("mount {mounted}"));
        }
    }
    Ok(all)
}

fn namespace_at(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?.to_string_lossy().into_owned();
    target.starts_with("net:[").then_some(target)
}

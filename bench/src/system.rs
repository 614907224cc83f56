//! What the kernel says of a program: memory, processor time, descriptors, network namespaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use crate::Failure;

/// The unit of times in /proc, the same for every program on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// A program's processes: the one that was started, and those that it has started itself.
fn processes(first: u32) -> Result<Vec<u32>, Failure> {
    let mut all = vec![first];
    for thread in fs::read_dir(format!("/proc/{first}/task"))? {
        let children = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        all.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    Ok(all)
}

/// Resident memory of a program (bytes). What its processes have mapped of files, which is mostly the program itself, they
/// share, and counts once.
pub(crate) fn resident(process: u32) -> Result<u64, Failure> {
    let (mut own, mut shared) = (0, 0);
    for process in processes(process)? {
        let status = fs::read_to_string(format!("/proc/{process}/status"))?;
        let field = |name: &str| -> Result<u64, Failure> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).ok_or("no such line in /proc")?;
            Ok(line.trim().trim_end_matches("kB").trim().parse()?)
        };
        own += field("RssAnon:")? + field("RssShmem:")?;
        shared = shared.max(field("RssFile:")?);
    }
    Ok((own + shared) * 1024)
}

/// Processor time that a program has used, its own and the kernel's for it (seconds).
pub(crate) fn processor_seconds(process: u32) -> Result<f64, Failure> {
    let mut seconds = 0.0;
    for process in processes(process)? {
        let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The program's name stands in parentheses and may hold anything; user and system time are fields 14 and 15.
        let rest = stat.rsplit_once(')').ok_or("no name in /proc/PID/stat")?.1;
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u32>().ok()).map(f64::from);
        let (user, system) = (ticks(11).ok_or("no user time")?, ticks(12).ok_or("no system time")?);
        seconds += (user + system) / TICKS_PER_SECOND;
    }
    Ok(seconds)
}

/// What each open descriptor of a program is.
pub(crate) fn descriptors(process: u32) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for process in processes(process)? {
        for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
            match fs::read_link(entry?.path()) {
                Ok(link) => all.push(link.to_string_lossy().into_owned()),
                // Closed since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
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

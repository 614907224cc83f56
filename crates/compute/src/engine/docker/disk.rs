//! Whether the engine holds the root of a container to a size, which depends on its storage driver and its disk.

/// `mounts` is the kernel's list (`/proc/self/mountinfo`), as far as the daemon sees the engine's disk.
pub(super) fn keeps_sizes(driver: &str, status: &[Vec<String>], data_root: &str, mounts: &str) -> bool {
    match driver {
        "btrfs" | "zfs" => true,
        "overlay2" => {
            let on_xfs =
                status.iter().any(|pair| pair.len() == 2 && pair[0] == "Backing Filesystem" && pair[1] == "xfs");
            on_xfs && has_project_quota(data_root, mounts)
        }
        _ => false,
    }
}

/// Whether the disk on which `path` lies was mounted with quotas of projects.
fn has_project_quota(path: &str, mounts: &str) -> bool {
    let beneath = |point: &str| {
        let point = point.trim_end_matches('/');
        path.strip_prefix(point).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    // Of equally long ones the later covers the earlier.
    let nearest = mounts
        .lines()
        .filter_map(|line| Some((line.split(' ').nth(4)?, line.rsplit(' ').next()?)))
        .filter(|(point, _)| beneath(point))
        .max_by_key(|(point, _)| point.len());
    nearest.is_some_and(|(_, options)| options.split(',').any(|option| matches!(option, "prjquota" | "pquota")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 21 7:0 / /var/lib/docker rw,relatime shared:9 - xfs /dev/loop0 rw,attr2,prjquota\n\
        31 21 7:1 / /var/lib/dockers rw - xfs /dev/loop1 rw,noquota\n";

    #[test]
    fn v5_a_size_is_promised_only_where_it_is_kept() {
        let xfs = [vec!["Backing Filesystem".to_owned(), "xfs".to_owned()]];
        let extfs = [vec!["Backing Filesystem".to_owned(), "extfs".to_owned()]];
        assert!(keeps_sizes("overlay2", &xfs, "/var/lib/docker", MOUNTS));
        assert!(keeps_sizes("overlay2", &xfs, "/var/lib/docker/100000.100000", MOUNTS));
        for root in ["/var/lib/dockers", "/var/lib/docker2", "/", ""] {
            assert!(!keeps_sizes("overlay2", &xfs, root, MOUNTS), "{root}");
        }
        assert!(!keeps_sizes("overlay2", &extfs, "/var/lib/docker", MOUNTS));
        assert!(!keeps_sizes("overlay2", &xfs, "/var/lib/docker", ""));
        assert!(keeps_sizes("btrfs", &[], "/x", ""));
        assert!(!keeps_sizes("vfs", &xfs, "/var/lib/docker", MOUNTS) && !keeps_sizes("", &[], "", ""));
    }
}

//! Finds containers that flood their log (V5): the engine spends far more processor time on a line than its writer, and
//! no limit of the engine's holds that.
//!
//! The engine's log file is looked at once a second, which costs one system call. It is cut off and begun anew at 1 MiB,
//! so that a new file means that at least the rest of the old one was filled.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use minicbor::{Decode, Encode};

/// How often the log of a running container is measured.
pub const LOG_SAMPLE: Duration = Duration::from_secs(1);
/// Growth that is borne for any length of time (bytes per second).
pub const RATE_MAX: u64 = 256 << 10;
/// So many more samples above it than below are a flood: pauses do not hide one, and a burst is forgotten in time.
pub const SAMPLES: u32 = 5;

/// A log file at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LogFile {
    /// Size (bytes).
    #[n(0)]
    pub size: u64,
    /// Its number in the file system.
    #[n(1)]
    pub inode: u64,
    /// When it was made, since 1970, where the file system says so; numbers are soon used again.
    #[n(2)]
    pub created: Option<Duration>,
}

impl LogFile {
    /// Looks at the file.
    pub fn read(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let created = metadata.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        Ok(Self { size: metadata.len(), inode: metadata.ino(), created })
    }
}

/// Watches one log file.
#[derive(Debug, Clone, Default)]
pub struct FloodWatch {
    last: Option<LogFile>,
    above: u32,
}

impl FloodWatch {
    /// Takes the next sample, `elapsed` after the last one, and says whether this is a flood.
    pub fn sample(&mut self, file: LogFile, elapsed: Duration) -> bool {
        let Some(last) = self.last.replace(file) else { return false };
        let replaced = (last.inode, last.created) != (file.inode, file.created) || file.size < last.size;
        let grown = u128::from(file.size.saturating_sub(last.size));
        let allowed = u128::from(RATE_MAX) * elapsed.as_millis() / 1000;
        // A slow writer's file is replaced now and then, but not in more samples than it is not.
        self.above =
            if replaced || grown > allowed { self.above.saturating_add(1) } else { self.above.saturating_sub(1) };
        self.above >= SAMPLES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FILE_MAX: u64 = 1 << 20;

    /// Writes at a steady rate into a file that is replaced at 1 MiB, and counts the samples until the alarm.
    fn seconds_until_alarm(rate: u64, samples: u64) -> Option<u64> {
        let mut watch = FloodWatch::default();
        (0..samples).find(|second| {
            let written = second * rate;
            let file = LogFile { size: written % FILE_MAX, inode: written / FILE_MAX, created: None };
            watch.sample(file, SECOND)
        })
    }

    #[test]
    fn v5_log_flood_is_found_at_every_rate_above_the_limit() {
        for rate in [257 << 10, 300_000, 1 << 20, 3_333_333, 50 << 20] {
            assert_eq!(seconds_until_alarm(rate, 100), Some(5), "{rate} B/s");
        }
    }

    #[test]
    fn ordinary_logs_and_bursts_raise_no_alarm() {
        for rate in [0, 1, 1000, 100 << 10, 200 << 10] {
            assert_eq!(seconds_until_alarm(rate, 1000), None, "{rate} B/s");
        }
        let mut watch = FloodWatch::default();
        let sizes = [0, 900 << 10, 900 << 10, 10, 900 << 10, 900 << 10];
        assert!(!sizes.iter().any(|size| watch.sample(LogFile { size: *size, inode: 1, created: None }, SECOND)));
    }

    #[test]
    fn v5_pauses_do_not_hide_a_flood() {
        let mut watch = FloodWatch::default();
        let flooding = |second: u64| second % 4 != 3;
        let alarm = (0..60_u64).find(|second| {
            let written = (0..*second).filter(|second| flooding(*second)).count() as u64 * (2 << 20);
            watch.sample(LogFile { size: written % FILE_MAX, inode: written / FILE_MAX, created: None }, SECOND)
        });
        assert!(alarm.is_some_and(|second| second < 20), "{alarm:?}");
    }

    #[test]
    fn v5_a_number_used_again_hides_nothing() {
        let mut watch = FloodWatch::default();
        let made = |seconds| Some(Duration::from_secs(seconds));
        let alarm = (0..10).position(|n| watch.sample(LogFile { size: n, inode: 7, created: made(n) }, SECOND));
        assert_eq!(alarm, Some(5));
    }
}

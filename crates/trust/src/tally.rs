//! Many things of one kind as few lines: the first at once, then one line a minute with a count.
//!
//! Whoever can be refused can be refused as often as he likes. What that costs the audit log, and memory, is bounded here
//! (V1, V5): so many kinds are told apart, all others are counted together.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Shortest time between two lines of one kind.
pub const PAUSE: Duration = Duration::from_mins(1);

/// A line that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<K> {
    /// About what.
    pub kind: K,
    /// How many since the last line.
    pub count: u64,
    /// What the latest of them was.
    pub detail: String,
}

#[derive(Debug)]
struct Counted {
    told_at: Instant,
    waiting: u64,
    detail: String,
}

/// Counts by kind.
#[derive(Debug)]
pub struct Tally<K> {
    kinds: HashMap<K, Counted>,
    kinds_max: usize,
    others: K,
}

impl<K: Copy + Eq + Hash> Tally<K> {
    /// Tells at most `kinds_max` kinds apart at one time; more are counted as `others`.
    pub fn new(kinds_max: usize, others: K) -> Self {
        Self { kinds: HashMap::new(), kinds_max, others }
    }

    /// Takes `count` of a kind; the line to write now, if the kind has been quiet.
    pub fn note(&mut self, kind: K, count: u64, detail: String, now: Instant) -> Option<Line<K>> {
        let known = self.kinds.contains_key(&kind);
        let kind = if known || self.kinds.len() < self.kinds_max { kind } else { self.others };
        if let Some(counted) = self.kinds.get_mut(&kind) {
            counted.waiting = counted.waiting.saturating_add(count);
            counted.detail = detail;
            return None;
        }
        self.kinds.insert(kind, Counted { told_at: now, waiting: 0, detail: String::new() });
        Some(Line { kind, count, detail })
    }

    /// How many of a kind wait for its next line; none if the kind is not known.
    pub fn waiting(&self, kind: &K) -> Option<u64> {
        self.kinds.get(kind).map(|counted| counted.waiting)
    }

    /// Takes back what a line could not be written for: the next of its kind is a first one again.
    pub fn forget(&mut self, is: impl Fn(&K) -> bool) {
        self.kinds.retain(|kind, _| !is(kind));
    }

    /// The lines that are due. Kinds that have been quiet since their last line are forgotten.
    pub fn due(&mut self, now: Instant) -> Vec<Line<K>> {
        self.lines(now, PAUSE)
    }

    /// All that has not been told, for the end of the program.
    pub fn rest(&mut self) -> Vec<Line<K>> {
        self.lines(Instant::now(), Duration::ZERO)
    }

    fn lines(&mut self, now: Instant, pause: Duration) -> Vec<Line<K>> {
        let mut lines = Vec::new();
        self.kinds.retain(|kind, counted| {
            if now.saturating_duration_since(counted.told_at) < pause {
                return true;
            }
            if counted.waiting == 0 {
                return false;
            }
            lines.push(Line { kind: *kind, count: counted.waiting, detail: std::mem::take(&mut counted.detail) });
            (counted.told_at, counted.waiting) = (now, 0);
            true
        });
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_v5_a_flood_of_one_kind_is_one_line_a_minute() {
        let (mut tally, start) = (Tally::new(8, 0), Instant::now());
        assert_eq!(tally.note(1, 1, "first".into(), start).map(|line| line.count), Some(1));
        for _ in 0..10_000 {
            assert_eq!(tally.note(1, 1, "again".into(), start), None);
        }
        assert!(tally.due(start + PAUSE / 2).is_empty());
        assert_eq!(tally.due(start + PAUSE), [Line { kind: 1, count: 10_000, detail: "again".into() }]);
        assert!(tally.due(start + 2 * PAUSE).is_empty());
        assert!(tally.kinds.is_empty(), "a quiet kind is forgotten");
    }

    #[test]
    fn v1_v5_a_flood_of_many_kinds_keeps_memory_and_lines_bounded() {
        let (mut tally, start) = (Tally::new(8, 0), Instant::now());
        let told = (1..=100_000).filter_map(|kind| tally.note(kind, 1, String::new(), start)).count() as u64;
        assert!(told <= 9 && tally.kinds.len() <= 9, "{told}");
        let lines = tally.due(start + PAUSE);
        assert_eq!((lines.len(), lines[0].kind, lines[0].count + told), (1, 0, 100_000));
    }

    #[test]
    fn what_could_not_be_written_is_a_first_one_again_and_the_rest_is_told_at_the_end() {
        let (mut tally, start) = (Tally::new(8, 0), Instant::now());
        tally.note(1, 1, String::new(), start);
        tally.forget(|kind| *kind == 1);
        assert!(tally.note(1, 1, String::new(), start).is_some());
        tally.note(1, 1, "last".into(), start);
        assert_eq!(tally.rest(), [Line { kind: 1, count: 1, detail: "last".into() }]);
        assert!(tally.rest().is_empty());
    }
}

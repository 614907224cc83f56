//! Hours of the day during which something may happen, in the local time of the machine that they are set on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::text_form;
use crate::unit::UnitError;

/// Minutes of a day.
pub const MINUTES_OF_DAY: u16 = 24 * 60;
/// Most ranges in one [`Hours`].
pub const RANGES_MAX: usize = 8;

/// Ranges of a day, such as `22:00-07:00,12:00-13:00`. A range that ends before it begins goes over midnight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hours(Vec<Range>);

/// From one minute of the day up to, and without, another. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    from: u16,
    to: u16,
}

impl Range {
    fn contains(self, minute: u16) -> bool {
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

impl Hours {
    /// Whether this minute of the day (0 is midnight) lies inside.
    pub fn contains(&self, minute: u16) -> bool {
        self.0.iter().any(|range| range.contains(minute))
    }

    /// The next minute of the day, from this one on, that lies inside.
    pub fn next(&self, minute: u16) -> u16 {
        if self.contains(minute) {
            return minute;
        }
        let wait = |range: &&Range| (range.from + MINUTES_OF_DAY - minute) % MINUTES_OF_DAY;
        self.0.iter().min_by_key(wait).map_or(minute, |range| range.from)
    }
}

/// A minute of the day as people write it: `07:30`.
pub fn clock_face(minute: u16) -> String {
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

impl fmt::Display for Hours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(f, "{separator}{}-{}", clock_face(range.from), clock_face(range.to))?;
        }
        Ok(())
    }
}

impl FromStr for Hours {
    type Err = UnitError;

    /// Accepts ranges with a comma between them: `22:00-07:00` or `9:00-12:30,14:00-18:00`.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let invalid = || {
            let shown: String = crate::text::escape(text).chars().take(100).collect();
            UnitError::new(format!(
                "'{shown}' are not hours of the day; write them as 22:00-07:00 or 9:00-12:00,13:00-18:00"
            ))
        };
        let ranges: Vec<Range> = text
            .split(',')
            .take(RANGES_MAX + 1)
            .map(|range| parse_range(range).ok_or_else(invalid))
            .collect::<Result<_, _>>()?;
        if ranges.len() > RANGES_MAX {
            return Err(UnitError::new(format!("at most {RANGES_MAX} ranges of hours are possible")));
        }
        Ok(Self(ranges))
    }
}

fn parse_range(text: &str) -> Option<Range> {
    let (from, to) = text.trim().split_once('-')?;
    let (from, to) = (parse_minute(from)?, parse_minute(to)?);
    // 24:00 is how people write the end of a day.
    (from != to && from < MINUTES_OF_DAY)
        .then_some(Range { from, to: to % MINUTES_OF_DAY })
        .filter(|range| range.from != range.to)
}

fn parse_minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let digits = |text: &str, most: usize| {
        ((1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse::<u16>().ok())?
    };
    let (hour, minute) = (digits(hour, 2)?, digits(minute, 2).filter(|_| minute.len() == 2)?);
    (minute < 60 && (hour < 24 || (hour, minute) == (24, 0))).then_some(hour * 60 + minute)
}

text_form!(Hours);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hours(text: &str) -> Hours {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_may_go_over_midnight() {
        let night = hours("22:00-07:00");
        for (minute, inside) in
            [(0, true), (419, true), (420, false), (720, false), (1319, false), (1320, true), (1439, true)]
        {
            assert_eq!(night.contains(minute), inside, "{minute}");
        }
        assert_eq!((night.next(720), night.next(10)), (1320, 10));
        let day = hours("9:00-12:00, 13:30-24:00");
        assert_eq!(day.to_string(), "09:00-12:00,13:30-00:00");
        assert_eq!((day.next(730), day.next(0)), (810, 540));
    }

    #[test]
    fn garbage_and_empty_ranges_are_refused() {
        let many = ["1:00-2:00"; RANGES_MAX + 1].join(",");
        for text in [
            "",
            "-",
            "22-7",
            "22:00",
            "25:00-01:00",
            "1:60-2:00",
            "1:0-2:00",
            "24:01-1:00",
            "8:00-8:00",
            "0:00-24:00x",
            "+1:00-2:00",
            "24:00-1:00",
            "0:00-00:00",
            &many,
        ] {
            assert!(text.parse::<Hours>().is_err(), "{text}");
        }
        // A whole day is no limit at all.
        assert!("0:00-24:00".parse::<Hours>().is_err());
    }

    proptest! {
        #[test]
        fn hours_round_trip(ranges in proptest::collection::vec((0_u16..MINUTES_OF_DAY, 1_u16..MINUTES_OF_DAY), 1..=RANGES_MAX)) {
            let range = |(from, length): (u16, u16)| Range { from, to: (from + length) % MINUTES_OF_DAY };
            let hours = Hours(ranges.into_iter().map(range).collect());
            prop_assert_eq!(&hours.to_string().parse::<Hours>().unwrap(), &hours);
            let bytes = crate::frame::encode(&hours);
            prop_assert_eq!(crate::frame::decode_strict::<Hours>(&bytes, 4096), Ok(hours.clone()));
            for minute in 0..MINUTES_OF_DAY {
                let next = hours.next(minute);
                prop_assert!(hours.contains(next));
                prop_assert_eq!(next == minute, hours.contains(minute));
            }
        }
    }
}

//! Moments as people read and type them. Everything is UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use peer_proto::unit::{Span, Timestamp};

/// The present moment by this machine's clock.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_millis().try_into().unwrap_or(u64::MAX))
}

/// How long ago `then` was, roughly: `45s`, `12m`, `3h`, `9d`.
pub(super) fn ago(now: Timestamp, then: Timestamp) -> String {
    match now.since(then) / 1000 {
        seconds @ ..120 => format!("{seconds}s"),
        seconds @ ..7200 => format!("{}m", seconds / 60),
        seconds @ ..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// A moment in RFC 3339 with milliseconds: `2026-11-23T08:30:00.125Z`.
pub(super) fn rfc3339(moment: Timestamp) -> String {
    let (days, rest) = (moment.0 / 86_400_000, moment.0 % 86_400_000);
    let (year, month, day) = date_of(days);
    let (seconds, milliseconds) = (rest / 1000, rest % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// What `--since` says: a span before `now` (`10m`) or a moment (`2026-11-23T08:30:00Z`, time and zone optional).
pub(super) fn parse_since(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(span) = text.parse::<Span>() {
        return Ok(Timestamp(now.0.saturating_sub(span.seconds.saturating_mul(1000))));
    }
    parse_moment(text).ok_or_else(|| {
        format!("'{text}' is neither a span such as 10m nor a moment such as 2026-11-23T08:30:00Z; write --since 10m")
    })
}

fn parse_moment(text: &str) -> Option<Timestamp> {
    let (date, time) = match text.split_once(['T', 't', ' ']) {
        Some((date, time)) => (date, Some(time)),
        None => (text, None),
    };
    let mut parts = date.split('-');
    let (year, month, day) = (number(parts.next()?, 4)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
    let days = days_to(year, month, day)?;
    let milliseconds = days.checked_mul(86_400_000)?;
    if parts.next().is_some() {
        return None;
    }
    let Some(time) = time else { return Some(Timestamp(milliseconds)) };
    let (time, offset_minutes) = split_zone(time)?;
    let moment = i64::try_from(milliseconds.checked_add(time_of_day(time)?)?).ok()?;
    u64::try_from(moment.checked_sub(offset_minutes * 60_000)?).ok().map(Timestamp)
}

/// Splits `08:30:00+01:00` into the time and the offset from UTC (minutes).
fn split_zone(text: &str) -> Option<(&str, i64)> {
    if let Some(time) = text.strip_suffix(['Z', 'z']) {
        return Some((time, 0));
    }
    let Some(at) = text.rfind(['+', '-']) else { return Some((text, 0)) };
    let (hours, minutes) = text[at + 1..].split_once(':')?;
    let (hours, minutes) = (number(hours, 2).filter(|h| *h < 24)?, number(minutes, 2).filter(|m| *m < 60)?);
    let offset = i64::try_from(hours * 60 + minutes).ok()?;
    Some((&text[..at], if text[at..].starts_with('-') { -offset } else { offset }))
}

/// Milliseconds since midnight of `08:30`, `08:30:15` or `08:30:15.25`.
fn time_of_day(text: &str) -> Option<u64> {
    let (clock, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let mut parts = clock.split(':');
    let hour = number(parts.next()?, 2).filter(|hour| *hour < 24)?;
    let minute = number(parts.next()?, 2).filter(|minute| *minute < 60)?;
    let second = parts.next().map_or(Some(0), |second| number(second, 2)).filter(|second| *second < 60)?;
    let digits = !fraction.is_empty() && fraction.bytes().all(|b| b.is_ascii_digit());
    if parts.next().is_some() || !digits {
        return None;
    }
    let milliseconds: u64 = format!("{fraction:0<3.3}").parse().ok()?;
    Some((hour * 3600 + minute * 60 + second) * 1000 + milliseconds)
}

/// Exactly `length` decimal digits.
fn number(text: &str, length: usize) -> Option<u64> {
    (text.len() == length && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

fn is_leap(year: u64) -> bool {
    (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
}

fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date, if that date exists and is not earlier.
fn days_to(year: u64, month: u64, day: u64) -> Option<u64> {
    if year < 1970 || !(1..=12).contains(&month) || !(1..=days_in(year, month)).contains(&day) {
        return None;
    }
    let years: u64 = (1970..year).map(|year| if is_leap(year) { 366 } else { 365 }).sum();
    let months: u64 = (1..month).map(|month| days_in(year, month)).sum();
    Some(years + months + day - 1)
}

/// Year, month and day of the day so many days after 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn date_of(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn moments_round_trip() {
        for (milliseconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_827_696_789, "2000-02-29T12:34:56.789Z"),
            (1_795_422_600_125, "2026-11-23T08:30:00.125Z"),
        ] {
            assert_eq!(rfc3339(Timestamp(milliseconds)), text);
            assert_eq!(parse_since(text, Timestamp(0)).unwrap(), Timestamp(milliseconds));
        }
    }

    #[test]
    fn since_accepts_spans_and_moments() {
        let now = Timestamp(1_795_422_600_000);
        for (text, expected) in [
            ("10m", now.0 - 600_000),
            ("0", now.0),
            ("2026-11-23", now.0 - 8 * 3_600_000 - 30 * 60_000),
            ("2026-11-23T08:30", now.0),
            ("2026-11-23 08:30:00.5", now.0 + 500),
            ("2026-11-23T09:30:00+01:00", now.0),
            ("2026-11-23T03:00:00-05:30", now.0),
        ] {
            assert_eq!(parse_since(text, now), Ok(Timestamp(expected)), "{text}");
        }
        for text in [
            "",
            "yesterday",
            "-5m",
            "2026-13-01",
            "2026-02-29",
            "2026-11-23T24:00",
            "2026-11-23T08:30:00+1",
            "1969-01-01",
        ] {
            assert!(parse_since(text, now).unwrap_err().contains("--since"), "{text}");
        }
    }

    #[test]
    fn ages_are_rounded_down() {
        let now = Timestamp(10 * 86_400_000);
        for (back, text) in [(45_000, "45s"), (150_000, "2m"), (3 * 3_600_000, "3h"), (9 * 86_400_000, "9d")] {
            assert_eq!(ago(now, Timestamp(now.0 - back)), text);
        }
        assert_eq!(ago(now, now.plus(5)), "0s");
    }
}

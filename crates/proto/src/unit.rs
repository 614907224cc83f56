//! Units: a type for each quantity, valid by construction, with the text forms that people type.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};
use serde::{Deserialize, Serialize};

/// A quantity that cannot be what it claims to be. The sentence names no field; the caller adds that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(String);

impl UnitError {
    /// A quantity that is not what this sentence says it must be.
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

macro_rules! cbor_through {
    ($type:ty, $read:ident, $write:ident) => {
        impl<C> Encode<C> for $type {
            fn encode<W: encode::Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
                e.$write(self.get())?.ok()
            }
        }
        impl<'b, C> Decode<'b, C> for $type {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
                Self::new(d.$read()?).map_err(|error| decode::Error::message(error.to_string()))
            }
        }
    };
}

/// Share of processors in thousandths of one: 500 is half a processor. Never zero, at most 1,024 processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Millicores(u32);

impl Millicores {
    /// Largest value accepted.
    pub const MAX: u32 = 1_024_000;

    /// Checks the range.
    pub fn new(value: u32) -> Result<Self, UnitError> {
        match value {
            1..=Self::MAX => Ok(Self(value)),
            _ => Err(UnitError(format!("CPU share must be between 0.001 and 1024 processors, not {value}m"))),
        }
    }

    /// Thousandths of a processor.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Millicores {
    type Error = UnitError;
    fn try_from(value: u32) -> Result<Self, UnitError> {
        Self::new(value)
    }
}

impl From<Millicores> for u32 {
    fn from(value: Millicores) -> u32 {
        value.0
    }
}

impl fmt::Display for Millicores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 { write!(f, "{whole}") } else { f.write_str(format!("{whole}.{rest:03}").trim_end_matches('0')) }
    }
}

impl FromStr for Millicores {
    type Err = UnitError;

    /// Accepts `2`, `0.5` (processors) and `500m` (thousandths).
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let invalid = || UnitError(format!("'{text}' is not a CPU share; write it as 0.5, 2 or 500m"));
        if let Some(thousandths) = text.strip_suffix('m') {
            return Self::new(digits(thousandths).ok_or_else(invalid)?.try_into().map_err(|_| invalid())?);
        }
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty() || fraction.len() > 3 {
            return Err(invalid());
        }
        let whole: u32 = digits(whole).ok_or_else(invalid)?.try_into().map_err(|_| invalid())?;
        let fraction: u32 = format!("{fraction:0<3}").parse().map_err(|_| invalid())?;
        Self::new(whole.checked_mul(1000).and_then(|value| value.checked_add(fraction)).ok_or_else(invalid)?)
    }
}

cbor_through!(Millicores, u32, u32);

/// A number of bytes above zero, at most 1 PiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct ByteSize(u64);

impl ByteSize {
    /// Largest value accepted (bytes).
    pub const MAX: u64 = 1 << 50;

    /// Checks the range.
    pub fn new(value: u64) -> Result<Self, UnitError> {
        match value {
            1..=Self::MAX => Ok(Self(value)),
            _ => Err(UnitError(format!("a size must be between 1 byte and 1 PiB, not {value}"))),
        }
    }

    /// A constant number of mebibytes.
    pub const fn mebibytes(value: u32) -> Self {
        assert!(value > 0);
        Self((value as u64) << 20)
    }

    /// The number of bytes.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for ByteSize {
    type Error = UnitError;
    fn try_from(value: u64) -> Result<Self, UnitError> {
        Self::new(value)
    }
}

impl From<ByteSize> for u64 {
    fn from(value: ByteSize) -> u64 {
        value.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_bytes(self.0))
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    /// Accepts a number with an optional unit as Docker does: `b`, `k`, `m`, `g`, `t`, also `KiB`, `MiB` and so on. All are powers of 1024.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let invalid = || UnitError(format!("'{text}' is not a size; write it as 268435456, 256m or 1g"));
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(invalid()),
        };
        let number = digits(number).ok_or_else(invalid)?;
        Self::new(number.checked_mul(1 << shift).ok_or_else(invalid)?)
    }
}

cbor_through!(ByteSize, u64, u64);

/// Formats a number of bytes for people: `1.5 MiB`.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = bytes.saturating_mul(10) / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit < UNITS.len() - 1 {
        tenths /= 1024;
        unit += 1;
    }
    if tenths.is_multiple_of(10) {
        format!("{} {}", tenths / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

/// A TCP port inside a container; never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Port(NonZeroU16);

impl Port {
    /// Checks that the port is not zero.
    pub fn new(value: u16) -> Result<Self, UnitError> {
        NonZeroU16::new(value).map(Self).ok_or_else(|| UnitError("a port must be between 1 and 65535, not 0".into()))
    }

    /// The number.
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

impl TryFrom<u16> for Port {
    type Error = UnitError;
    fn try_from(value: u16) -> Result<Self, UnitError> {
        Self::new(value)
    }
}

impl From<Port> for u16 {
    fn from(value: Port) -> u16 {
        value.get()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for Port {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        digits(text)
            .and_then(|value| u16::try_from(value).ok())
            .and_then(|value| Self::new(value).ok())
            .ok_or_else(|| UnitError(format!("'{text}' is not a port; it must be a number between 1 and 65535")))
    }
}

cbor_through!(Port, u16, u16);

/// A moment as milliseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, Encode, Decode)]
#[serde(transparent)]
#[cbor(transparent)]
pub struct Timestamp(#[n(0)] pub u64);

impl Timestamp {
    /// This moment moved forward by `milliseconds`, saturating.
    #[must_use]
    pub fn plus(self, milliseconds: u64) -> Self {
        Self(self.0.saturating_add(milliseconds))
    }

    /// Milliseconds from `earlier` to this moment; zero if it lies in the future.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A length of time in words, rounded down to its largest unit: `3 minutes`.
pub fn in_words(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

/// A span of time as people type it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Span {
    /// Length in seconds.
    pub seconds: u64,
}

impl FromStr for Span {
    type Err = UnitError;

    /// Accepts `90` or `90s` (seconds), `15m`, `24h`, `30d`.
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let invalid = || UnitError(format!("'{text}' is not a time span; write it as 90s, 15m, 24h or 30d"));
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let factor = match &text[split..] {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(invalid()),
        };
        let number = digits(&text[..split]).ok_or_else(invalid)?;
        let seconds =
            number.checked_mul(factor).filter(|seconds| *seconds <= 100 * 365 * 86_400).ok_or_else(invalid)?;
        Ok(Self { seconds })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seconds {
            s if s >= 86_400 && s % 86_400 == 0 => write!(f, "{}d", s / 86_400),
            s if s >= 3600 && s % 3600 == 0 => write!(f, "{}h", s / 3600),
            s if s >= 60 && s % 60 == 0 => write!(f, "{}m", s / 60),
            s => write!(f, "{s}s"),
        }
    }
}

/// Plain decimal digits only: no sign, no space, no separator.
fn digits(text: &str) -> Option<u64> {
    (!text.is_empty() && text.len() <= 19 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn cpu_shares_parse_as_people_write_them() {
        for (text, millicores) in [("2", 2000), ("0.5", 500), ("1.25", 1250), ("500m", 500), ("0.001", 1)] {
            assert_eq!(text.parse::<Millicores>().unwrap().get(), millicores, "{text}");
        }
        assert_eq!(Millicores(1250).to_string(), "1.25");
        assert_eq!(Millicores(2000).to_string(), "2");
    }

    #[test]
    fn garbage_zero_negative_and_huge_quantities_are_refused() {
        for text in
            ["", "0", "-1", "+1", "1.", "1.0001", ".5", "1e3", " 1", "4294967296", "99999999", "0m", "nan", "inf"]
        {
            assert!(text.parse::<Millicores>().is_err(), "cpu {text}");
        }
        for text in ["", "0", "-1", "1.5g", "1x", "m", "99999999999999999999", "9999999t", " 1m"] {
            assert!(text.parse::<ByteSize>().is_err(), "size {text}");
        }
        for text in ["", "0", "-80", "70000", "80/tcp", "0x50", "8 0", "+80"] {
            assert!(text.parse::<Port>().is_err(), "port {text}");
        }
        for text in ["", "-5m", "5y", "h", "99999999999d"] {
            assert!(text.parse::<Span>().is_err(), "span {text}");
        }
    }

    #[test]
    fn sizes_parse_and_print() {
        assert_eq!("256m".parse::<ByteSize>().unwrap().get(), 256 << 20);
        assert_eq!("1GiB".parse::<ByteSize>().unwrap().to_string(), "1 GiB");
        assert_eq!(format_bytes(1536), "1.5 KiB");
    }
}

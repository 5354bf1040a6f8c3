//! Numbers for people.

use std::time::Duration;

/// Three significant digits with a suffix: `26.7B`, `8.39M`, `512`.
pub(crate) fn short(count: u64) -> String {
    const SUFFIXES: [(f64, &str); 4] = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    let value = count as f64;
    // A value that three digits would round up to the next suffix belongs to it.
    let suffix = SUFFIXES.iter().find(|(unit, _)| value >= unit * 0.9995);
    match suffix {
        Some((unit, suffix)) => format!("{}{suffix}", three_digits(value / unit)),
        None => count.to_string(),
    }
}

fn three_digits(value: f64) -> String {
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$}")
}

/// All digits, in groups of three: `129,280`.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the largest binary unit that they fill: `1.50 GiB`, `264 B`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let value = |bits: u32| count as f64 / (1u64 << bits) as f64;
    // A value that three digits would round up to the next unit belongs to it.
    match UNITS.iter().find(|(bits, _)| value(*bits) >= 0.9995) {
        Some((bits, unit)) => format!("{} {unit}", three_digits(value(*bits))),
        None => format!("{count} B"),
    }
}

/// Hours, minutes and seconds, as precise as is useful: `2h 05m`, `3m 09s`, `12s`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h {minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_in_groups() {
        for (count, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (129_280, "129,280"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn three_digits_and_a_suffix() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1.00k"),
            (4_096, "4.10k"),
            (26_712_000_000, "26.7B"),
            (999_400, "999k"),
            (999_900, "1.00M"),
            (99_949, "99.9k"),
            (99_960, "100k"),
        ];
        for (count, text) in cases {
            assert_eq!(short(count), text);
        }
    }

    #[test]
    fn bytes_in_binary_units() {
        let cases = [
            (264, "264 B"),
            (1 << 10, "1.00 KiB"),
            (1023 << 20, "1023 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (8 << 30, "8.00 GiB"),
            (202_754_031_624, "189 GiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn durations() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (189, "3m 09s"), (7500, "2h 05m")] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}

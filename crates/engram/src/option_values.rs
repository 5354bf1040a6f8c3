//! Values of options that make sense only within bounds. What lies outside is refused before anything is opened.

use std::time::Duration;

/// Threads at most: a mistyped number would keep a machine busy with starting them.
const MOST_THREADS: usize = 1024;
/// A year.
const MOST_SECONDS: u64 = 365 * 86_400;

/// A number of threads.
///
/// # Errors
/// What is not a number from 1 to 1024.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) if (1..=MOST_THREADS).contains(&threads) => Ok(threads),
        _ => Err(format!("the number of threads must be from 1 to {MOST_THREADS}")),
    }
}

/// A time of at least a second.
///
/// # Errors
/// What is not a whole number of seconds from 1 to a year.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    match any_seconds(text) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(format!("the seconds must be a whole number from 1 to {MOST_SECONDS}")),
    }
}

/// A time, or none at all.
///
/// # Errors
/// What is not a whole number of seconds from 0 to a year.
pub(crate) fn any_seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds) if seconds <= MOST_SECONDS => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("the seconds must be a whole number from 0 to {MOST_SECONDS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_is_refused() {
        assert_eq!((threads("1"), threads("1024")), (Ok(1), Ok(1024)));
        assert_eq!((seconds("1"), any_seconds("0")), (Ok(Duration::from_secs(1)), Ok(Duration::ZERO)));
        assert!(
            ["0", "1025", "-1", "1.5", "many", "18446744073709551616"]
                .iter()
                .all(|text| threads(text).is_err())
        );
        assert!(
            ["0", "31536001", "-1", "1.5", "", "18446744073709551615"]
                .iter()
                .all(|text| seconds(text).is_err())
        );
        assert!(any_seconds("31536001").is_err());
    }
}

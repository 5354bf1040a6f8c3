//! The end of a time limit.

use std::time::{Duration, Instant};

/// When something has to be done by; never, where the limit is longer than the clock can count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// `limit` from now.
    pub(crate) fn after(limit: Duration) -> Self {
        Self(Instant::now().checked_add(limit))
    }

    /// The time that is left: none after the end, [`Duration::MAX`] if there is no end.
    pub(crate) fn left(self) -> Duration {
        self.0.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn has_passed(self) -> bool {
        self.left().is_zero()
    }

    /// This one, or `limit` from now if that is sooner.
    #[cfg(feature = "redis")]
    pub(crate) fn within(self, limit: Duration) -> Self {
        Self::after(self.left().min(limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_limit_has_an_end_or_none() {
        let soon = Deadline::after(Duration::ZERO);
        assert!(soon.has_passed() && soon.left().is_zero());
        let later = Deadline::after(Duration::from_secs(60));
        assert!(!later.has_passed() && later.left() <= Duration::from_secs(60));
        let never = Deadline::after(Duration::MAX);
        assert_eq!((never.left(), never.has_passed()), (Duration::MAX, false));
    }
}

//! Learning-rate schedules: each step's share of the peak rate.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Share of the largest rate at step `at`, from 0, of `steps`: it rises in a line over `warmup` steps and falls to zero in
/// a line after them.
pub(crate) fn rise_and_fall(at: f64, warmup: f64, steps: f64) -> f64 {
    let rising = if warmup > 0.0 { (at + 1.0) / warmup } else { 1.0 };
    let falling = (steps - at) / (steps - warmup);
    rising.min(falling).min(1.0)
}

/// A linear warm-up, then a decay.
///
/// ```toml
/// [schedule]
/// warmup = 200
/// decay = { step = [{ after = 0.8, factor = 0.316 }, { after = 0.9, factor = 0.316 }] }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Steps of warm-up: the rate of step `s` (from 0) is `(s + 1) / warmup` of the peak.
    #[serde(default)]
    pub warmup: u64,
    /// The schedule after the warm-up.
    pub decay: Decay,
}

/// The schedule after the warm-up. "Progress" is the share of the steps after the warm-up that are done: 0 at the
/// first of them, 1 when training ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// The peak rate throughout.
    Constant,
    /// The rate is multiplied by factors at points of the training.
    Step(Vec<StepDown>),
    /// Half a cosine from 1 to `floor` over the progress.
    Cosine {
        /// Share of the peak at the end.
        floor: f64,
    },
    /// Warm-up, stable, decay: the peak rate until the last part of the training.
    Wsd {
        /// Share of all steps that decay takes, 0 < fraction ≤ 1.
        fraction: f64,
        /// The form of the decay.
        shape: WsdShape,
        /// Share of the peak at the end.
        #[serde(default)]
        floor: f64,
    },
}

/// Multiplies the rate from a point of the training on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct StepDown {
    /// Share of all steps, warm-up included, after which the factor applies.
    pub after: f64,
    /// Factor of the rate.
    pub factor: f64,
}

/// The shape of the decay in a [`Decay::Wsd`] schedule, with `x` from 0 at its start to 1 at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WsdShape {
    /// `1 − x`.
    Linear,
    /// `1 − √x`: fast at first.
    OneMinusSqrt,
}

impl Schedule {
    /// Checks that the schedule is valid for a training of `total` steps.
    ///
    /// # Errors
    /// A warm-up that never ends, a share or factor out of its range, or step points out of order.
    pub fn validate(&self, total: u64) -> Result<(), ConfigError> {
        if self.warmup >= total {
            let reason = format!("must end before the training, which has {total} steps");
            return Err(refused("schedule.warmup", self.warmup, reason));
        }
        match &self.decay {
            Decay::Constant => Ok(()),
            Decay::Step(downs) => validate_steps(downs),
            Decay::Cosine { floor } => share("schedule.decay.cosine.floor", *floor),
            Decay::Wsd { fraction, floor, .. } => {
                share("schedule.decay.wsd.fraction", *fraction)?;
                share("schedule.decay.wsd.floor", *floor)?;
                let (warmup, stable) = (self.warmup as f64, (1.0 - fraction) * total as f64);
                if *fraction == 0.0 || warmup > stable {
                    let reason =
                        format!("above 0, and the decay must begin after the warm-up of {}", self.warmup);
                    return Err(refused("schedule.decay.wsd.fraction", fraction, reason));
                }
                Ok(())
            }
        }
    }

    /// The share of the peak rate for step `step`, counted from 0, of `total`. Steps at or after `total` have the final
    /// rate.
    pub fn rate(&self, step: u64, total: u64) -> f32 {
        let step = step.min(total);
        if step < self.warmup {
            return ((step + 1) as f64 / self.warmup as f64) as f32;
        }
        let (at, total, warmup) = (step as f64, total as f64, self.warmup as f64);
        let rate = match &self.decay {
            Decay::Constant => 1.0,
            Decay::Step(downs) => {
                downs.iter().filter(|down| at >= down.after * total).map(|down| down.factor).product()
            }
            Decay::Cosine { floor } => {
                let progress = if total > warmup { (at - warmup) / (total - warmup) } else { 1.0 };
                floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
            Decay::Wsd { fraction, shape, floor } => {
                let start = (1.0 - fraction) * total;
                let x = ((at - start) / (total - start)).clamp(0.0, 1.0);
                let fall = match shape {
                    WsdShape::Linear => 1.0 - x,
                    WsdShape::OneMinusSqrt => 1.0 - x.sqrt(),
                };
                floor + (1.0 - floor) * fall
            }
        };
        rate as f32
    }
}

fn validate_steps(downs: &[StepDown]) -> Result<(), ConfigError> {
    for down in downs {
        share("schedule.decay.step.after", down.after)?;
        if !(down.factor > 0.0 && down.factor.is_finite()) {
            return Err(refused("schedule.decay.step.factor", down.factor, "a number above 0"));
        }
    }
    match downs.windows(2).find(|pair| pair[0].after >= pair[1].after) {
        Some(pair) => {
            let reason = format!("must be after the previous one, at {}", pair[0].after);
            Err(refused("schedule.decay.step.after", pair[1].after, reason))
        }
        None => Ok(()),
    }
}

/// The error that `key`, a path below `train`, has a `value` that breaks the rule `reason`.
fn refused(key: &str, value: impl Display, reason: impl Into<String>) -> ConfigError {
    ConfigError::new("train.schedule", format!("{key} = {value}: {}", reason.into()))
}

fn share(key: &'static str, value: f64) -> Result<(), ConfigError> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(refused(key, value, "a share, from 0 to 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(warmup: u64, decay: Decay) -> Schedule {
        Schedule { warmup, decay }
    }

    fn rates(schedule: &Schedule, steps: &[u64], total: u64) -> Vec<f32> {
        schedule.validate(total).unwrap();
        steps.iter().map(|step| schedule.rate(*step, total)).collect()
    }

    #[test]
    fn warm_up_is_linear_and_never_zero() {
        let constant = schedule(4, Decay::Constant);
        assert_eq!(
            rates(&constant, &[0, 1, 2, 3, 4, 99, 100, 1000], 100),
            [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(rates(&schedule(0, Decay::Constant), &[0, 5], 10), [1.0, 1.0]);
    }

    #[test]
    fn step_decay_multiplies_factors_at_shares_of_all_steps() {
        let downs = vec![StepDown { after: 0.8, factor: 0.5 }, StepDown { after: 0.9, factor: 0.25 }];
        let step = schedule(10, Decay::Step(downs));
        assert_eq!(
            rates(&step, &[9, 10, 79, 80, 89, 90, 99, 100], 100),
            [1.0, 1.0, 1.0, 0.5, 0.5, 0.125, 0.125, 0.125]
        );
    }

    #[test]
    fn cosine_falls_from_the_peak_to_its_floor() {
        let cosine = schedule(20, Decay::Cosine { floor: 0.1 });
        assert_eq!(rates(&cosine, &[19, 20, 60, 100, 500], 100), [1.0, 1.0, 0.55, 0.1, 0.1]);
        let quarter = 0.1 + 0.9 * 0.5 * (1.0 + std::f32::consts::FRAC_1_SQRT_2);
        assert!((cosine.rate(40, 100) - quarter).abs() < 1e-6);
    }

    #[test]
    fn wsd_holds_and_then_falls() {
        let wsd = |shape, floor| schedule(10, Decay::Wsd { fraction: 0.5, shape, floor });
        let steps = [9, 10, 50, 62, 75, 100];
        assert_eq!(rates(&wsd(WsdShape::Linear, 0.0), &steps, 100), [1.0, 1.0, 1.0, 0.76, 0.5, 0.0]);
        assert_eq!(rates(&wsd(WsdShape::Linear, 0.5), &[75, 100], 100), [0.75, 0.5]);
        // x = 0.25 at step 150 of 100..300, 0.81 at 262.
        let sqrt = schedule(0, Decay::Wsd { fraction: 2.0 / 3.0, shape: WsdShape::OneMinusSqrt, floor: 0.0 });
        let found = rates(&sqrt, &[0, 100, 150, 262, 300], 300);
        for (found, expected) in found.iter().zip([1.0, 1.0, 0.5, 0.1, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let refused = |schedule: Schedule, key: &str| {
            let message = schedule.validate(100).unwrap_err().to_string();
            assert!(message.starts_with(&format!("`train.schedule`: {key} = ")), "{message}");
        };
        let step = |pairs: &[(f64, f64)]| {
            schedule(
                0,
                Decay::Step(pairs.iter().map(|&(after, factor)| StepDown { after, factor }).collect()),
            )
        };
        let wsd = |fraction, floor| Decay::Wsd { fraction, shape: WsdShape::Linear, floor };
        refused(schedule(100, Decay::Constant), "schedule.warmup");
        refused(step(&[(1.5, 0.1)]), "schedule.decay.step.after");
        refused(step(&[(0.9, 0.1), (0.8, 0.1)]), "schedule.decay.step.after");
        refused(step(&[(0.9, 0.0)]), "schedule.decay.step.factor");
        refused(step(&[(0.9, f64::NAN)]), "schedule.decay.step.factor");
        refused(schedule(0, Decay::Cosine { floor: -0.1 }), "schedule.decay.cosine.floor");
        refused(schedule(0, wsd(0.0, 0.0)), "schedule.decay.wsd.fraction");
        refused(schedule(60, wsd(0.5, 0.0)), "schedule.decay.wsd.fraction");
        refused(schedule(0, wsd(0.5, 2.0)), "schedule.decay.wsd.floor");
    }

    #[test]
    fn configurations_read_as_documented_and_name_the_line_of_a_mistake() {
        let read = |text: &str| toml::from_str::<Schedule>(text);
        let steps = "warmup = 200\ndecay = { step = [{ after = 0.8, factor = 0.316 }] }";
        let expected = Decay::Step(vec![StepDown { after: 0.8, factor: 0.316 }]);
        assert_eq!(read(steps).unwrap(), schedule(200, expected));
        assert_eq!(read("decay = \"constant\"").unwrap(), schedule(0, Decay::Constant));
        let wsd = "[decay.wsd]\nfraction = 0.2\nshape = \"one_minus_sqrt\"";
        let expected = Decay::Wsd { fraction: 0.2, shape: WsdShape::OneMinusSqrt, floor: 0.0 };
        assert_eq!(read(wsd).unwrap(), schedule(0, expected));

        let message = read("warmup = 10\n[decay.cosine]\nflor = 0.1").unwrap_err().to_string();
        assert!(message.contains("line 3") && message.contains("flor"), "{message}");
        let message = read("warmup = 10\ndecay = \"cosin\"").unwrap_err().to_string();
        assert!(message.contains("line 2") && message.contains("cosin"), "{message}");
    }
}

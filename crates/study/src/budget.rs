//! Configurations with the same cost as another one.
//!
//! Arms of a study differ in one thing only if they cost the same. A key of the configuration, such as the rows of a
//! head, is adjusted until a cost, such as the total number of parameters, equals the reference's. Costs grow with such
//! keys, so bisection finds the value.

use engram_config::{Account, ModelConfig, RunConfig};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::patch::{lookup, lookup_mut, parse};

/// A cost that arms can have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// All parameters, memory included; to 0.5 %.
    Total,
    /// Parameters that a token uses; to 1 %.
    Active,
    /// Floating-point operations per token; to 1 %.
    Flops,
    /// Rows of all memory tables; to 3 %, because small tables have few primes to choose from.
    Rows,
}

/// A key to adjust until a cost equals the reference's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Solve {
    /// Dotted key of a whole number, or of a list of them, which then keep their proportions.
    pub key: String,
    /// The cost.
    pub equal: Cost,
}

impl Cost {
    /// This cost of a valid configuration.
    ///
    /// # Errors
    /// When the primes run out for its rows.
    pub fn of(self, model: &ModelConfig) -> Result<u64, String> {
        let rows = model.table_rows().map_err(|error| error.to_string())?;
        let account = Account::of(model, &rows);
        Ok(match self {
            Self::Total => account.total,
            Self::Active => account.active,
            Self::Flops => account.forward_flops,
            Self::Rows => rows.iter().sum(),
        })
    }

    /// The relative difference that counts as equal.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Total => 0.005,
            Self::Active | Self::Flops => 0.01,
            Self::Rows => 0.03,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Total => "parameters",
            Self::Active => "active parameters",
            Self::Flops => "operations per token",
            Self::Rows => "memory rows",
        }
    }
}

/// Adjusts `solve.key` of `config` until the cost is as close to `target` as whole numbers allow.
pub(crate) fn meet(config: &mut Table, solve: &Solve, target: u64) -> Result<(), String> {
    let knob = Knob::of(config, &solve.key)?;
    let mut cost = |setting: u64| -> Result<u64, String> {
        knob.set(config, setting);
        solve.equal.of(&parse(config)?.model)
    };
    // The smallest valid setting, then the first at which the cost reaches the target.
    let least = [0, 1, 2].into_iter().find(|&setting| cost(setting).is_ok());
    let least = least.or_else(|| knob.least_valid(&mut cost));
    let Some(least) = least else {
        return Err(cost(knob.start).err().unwrap_or_else(|| format!("`{}` has no valid value", solve.key)));
    };
    let (mut below, mut above) = (least, least.max(1));
    while cost(above)? < target {
        below = above;
        above = above.checked_mul(2).filter(|&above| above < 1 << 40).ok_or_else(|| {
            format!("`{}` does not raise its {} to {target}", solve.key, solve.equal.name())
        })?;
    }
    while above - below > 1 {
        let middle = below + (above - below) / 2;
        if cost(middle)? < target { below = middle } else { above = middle }
    }
    let (low, high) = (cost(below)?, cost(above)?);
    let (nearest, found) =
        if target.abs_diff(low) <= target.abs_diff(high) { (below, low) } else { (above, high) };
    knob.set(config, nearest);
    check(solve.equal, found, target).map_err(|problem| format!("{problem} with `{}` = {nearest}", solve.key))
}

/// Checks that `found` counts as equal to `target`.
pub(crate) fn check(cost: Cost, found: u64, target: u64) -> Result<(), String> {
    let off = found as f64 / target as f64 - 1.0;
    if off.abs() <= cost.tolerance() {
        return Ok(());
    }
    Err(format!(
        "no configuration meets the budget: it needs {target} {} (±{} %); the nearest \
         value is {found} ({:+.2} %)",
        cost.name(),
        100.0 * cost.tolerance(),
        100.0 * off
    ))
}

/// A key whose value is a number, or a list that is scaled by its first number.
struct Knob<'a> {
    key: &'a str,
    /// The list's values, to keep their proportions; one value if it is not a list.
    values: Vec<u64>,
    list: bool,
    start: u64,
}

impl<'a> Knob<'a> {
    fn of(config: &Table, key: &'a str) -> Result<Self, String> {
        let whole = |value: &Value| value.as_integer().and_then(|value| u64::try_from(value).ok());
        let refused =
            || format!("`{key}` cannot be adjusted: it is not a whole number or a list of whole numbers");
        let (values, list) = match lookup(config, key) {
            Some(Value::Array(values)) => (values.iter().map(whole).collect::<Option<Vec<_>>>(), true),
            Some(value) => (whole(value).map(|value| vec![value]), false),
            None => return Err(format!("`{key}` cannot be adjusted: it does not exist")),
        };
        let values = values.filter(|values| values.first().is_some_and(|&first| first > 0));
        let values = values.ok_or_else(refused)?;
        Ok(Self { key, start: values[0], values, list })
    }

    fn set(&self, config: &mut Table, setting: u64) {
        let scaled = |&value: &u64| {
            let scaled = u128::from(value) * u128::from(setting) + u128::from(self.values[0] / 2);
            Value::Integer((scaled / u128::from(self.values[0])) as i64)
        };
        let mut values: Vec<Value> = self.values.iter().map(scaled).collect();
        let value = if self.list { Value::Array(values) } else { values.remove(0) };
        if let Some(place) = lookup_mut(config, self.key) {
            *place = value;
        }
    }

    /// The smallest valid setting, if small ones are invalid but the one in the file is valid.
    fn least_valid(&self, cost: &mut impl FnMut(u64) -> Result<u64, String>) -> Option<u64> {
        cost(self.start).ok()?;
        let (mut refused, mut valid) = (2, self.start);
        while valid - refused > 1 {
            let middle = refused + (valid - refused) / 2;
            if cost(middle).is_ok() { valid = middle } else { refused = middle }
        }
        Some(valid)
    }
}

/// Parameters of one routed expert over all blocks.
pub(crate) fn expert_parameters(config: &RunConfig) -> Option<u64> {
    let model = &config.model;
    let experts = model.experts.as_ref()?;
    Some((3 * model.width * experts.width * (model.blocks - experts.first_block)) as u64)
}

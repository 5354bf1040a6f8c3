//! Changes of a configuration, as TOML.

use engram_config::RunConfig;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// A change of the base's configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// Changed values; tables are merged, everything else is replaced.
    #[serde(default)]
    pub set: Table,
    /// Dotted keys to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// The configuration that a table describes, if it is valid.
pub(crate) fn parse(table: &Table) -> Result<RunConfig, String> {
    let config: RunConfig =
        table.clone().try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

/// The value at a dotted key.
pub(crate) fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
        None => table.get(key),
    }
}

/// The value at a dotted key, mutable.
pub(crate) fn lookup_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((first, rest)) => lookup_mut(table.get_mut(first)?.as_table_mut()?, rest),
        None => table.get_mut(key),
    }
}

/// Removes the value at a dotted key.
pub(crate) fn remove(table: &mut Table, key: &str) -> Result<(), String> {
    let (parent, last) = match key.rsplit_once('.') {
        Some((parent, last)) => (lookup_mut(table, parent).and_then(Value::as_table_mut), last),
        None => (Some(table), key),
    };
    match parent.and_then(|parent| parent.remove(last)) {
        Some(_) => Ok(()),
        None => Err(format!("cannot remove `{key}`: the base does not have it")),
    }
}

/// Merges `changes` into `table`: tables are merged, everything else is replaced.
pub(crate) fn merge(table: &mut Table, changes: &Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            (Some(Value::Table(inner)), Value::Table(change)) => merge(inner, change),
            _ => _ = table.insert(key.clone(), change.clone()),
        }
    }
}

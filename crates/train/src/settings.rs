//! What a resumed run changes in its settings.

use std::collections::BTreeMap;
use std::path::Path;

use engram_config::RunConfig;
use toml::{Table, Value};

use crate::error::Error;

/// A setting of a run that is another when it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingChange {
    /// Its dotted key, such as `train.seed`.
    pub key: String,
    /// What it was; none: not set.
    pub before: Option<String>,
    /// What it is from now on; none: not set.
    pub after: Option<String>,
}

impl std::fmt::Display for SettingChange {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".to_owned());
        write!(out, "{}: {}, now {}", self.key, text(&self.before), text(&self.after))
    }
}

/// Settings that may change without a word of leave: how often something is done beside the training, and where and how
/// the same numbers are computed. Every other setting decides what the run learns.
const HARMLESS: [&str; 8] = [
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.evaluate_tokens",
    "train.keep",
    "train.micro_batch",
    "train.memory.storage",
    "train.recompute",
    "train.skip_limit",
];

impl SettingChange {
    fn is_harmless(&self) -> bool {
        HARMLESS.contains(&self.key.as_str())
    }
}

/// The settings of `[train]` and `[text]` that differ, in the order of their keys. The model and the data are compared
/// by other means: the one may not differ, the other may lie elsewhere.
pub fn setting_changes(saved: &RunConfig, config: &RunConfig) -> Vec<SettingChange> {
    let (before, after) = (flat(saved), flat(config));
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let change = |key: &String| {
        let (before, after) = (before.get(key).cloned(), after.get(key).cloned());
        (before != after).then(|| SettingChange { key: key.clone(), before, after })
    };
    keys.into_iter().filter_map(change).collect()
}

/// Refuses changes that would make another run of it, but for those named in `allowed`, by their keys or the keys of
/// tables that they stand in.
pub(crate) fn check(changes: &[SettingChange], allowed: &[String], folder: &Path) -> Result<(), Error> {
    let named = |change: &&SettingChange| {
        allowed.iter().any(|key| {
            change.key.strip_prefix(key.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    };
    let refused: Vec<_> = changes.iter().filter(|change| !change.is_harmless() && !named(change)).collect();
    if refused.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = refused.iter().map(|change| format!("\n  {change}")).collect();
    let keys: Vec<_> = refused.iter().map(|change| change.key.as_str()).collect();
    Err(Error::Mismatch(format!(
        "{}: this run began with other settings:{}\nPut them back, or name what is to change from here on: --change {}",
        folder.display(),
        lines.concat(),
        keys.join(",")
    )))
}

/// Refuses keys that are no settings of a run: a misspelt one would be silently of no use.
///
/// # Errors
/// With the first of them.
pub(crate) fn check_keys(allowed: &[String], saved: &RunConfig, config: &RunConfig) -> Result<(), Error> {
    let known: Vec<String> = flat(saved).into_keys().chain(flat(config).into_keys()).collect();
    let is_known = |key: &&String| {
        ["data", "data.train", "data.valid"].contains(&key.as_str())
            || HARMLESS.contains(&key.as_str())
            || known.iter().any(|known| known == *key || known.starts_with(&format!("{key}.")))
    };
    match allowed.iter().find(|key| !is_known(key)) {
        None => Ok(()),
        Some(key) => Err(Error::Mismatch(format!(
            "--change {key}: neither configuration has this setting; settings are named as in `train.optimizer.adam_rate`"
        ))),
    }
}

/// Settings by dotted key, as TOML writes them.
fn flat(config: &RunConfig) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    // A valid configuration has no number that TOML lacks.
    let table =
        |table: Result<Table, toml::ser::Error>| Value::Table(table.expect("valid settings are TOML"));
    add("text", &table(Table::try_from(&config.text)), &mut all);
    add("train", &table(Table::try_from(&config.train)), &mut all);
    all
}

fn add(key: &str, value: &Value, all: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            table.iter().for_each(|(name, value)| add(&format!("{key}.{name}"), value, all))
        }
        value => _ = all.insert(key.to_owned(), value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(train: &str) -> RunConfig {
        toml::from_str(&format!(
            "[model]\nvocabulary = 64\nwidth = 16\nblocks = 2\ncontext = 8\n\
             attention = {{ kind = \"plain\", heads = 2, head_width = 8 }}\nfeed_forward = {{ width = 32 }}\n\
             [data]\ntrain = \"t\"\nvalid = \"v\"\ntokenizer = \"k\"\n\
             [train]\n{train}"
        ))
        .unwrap()
    }

    const BASE: &str = "steps = 10\nbatch = 4\nschedule = { decay = { cosine = { floor = 0.1 } } }";

    fn refused(change: (&str, &str), allowed: &[&str]) -> Option<String> {
        let (saved, config) = (config(BASE), config(&BASE.replacen(change.0, change.1, 1)));
        let changes = setting_changes(&saved, &config);
        assert_eq!(changes.is_empty(), saved == config);
        let allowed: Vec<_> = allowed.iter().map(|&key| key.to_owned()).collect();
        check_keys(&allowed, &saved, &config).unwrap();
        check(&changes, &allowed, Path::new("run")).err().map(|error| error.to_string())
    }

    #[test]
    fn what_would_change_the_run_is_refused_by_name() {
        for (change, line) in [
            (("steps = 10", "steps = 10\nseed = 5"), "train.seed: 0, now 5"),
            (("steps = 10", "steps = 11"), "train.steps: 10, now 11"),
            (("batch = 4", "batch = 8"), "train.batch: 4, now 8"),
            (("floor = 0.1", "floor = 0.2"), "train.schedule.decay.cosine.floor: 0.1, now 0.2"),
            (("cosine = { floor = 0.1 }", "wsd = { fraction = 0.5, shape = \"linear\" }"), "now not set"),
            (("batch", "documents_apart = true\nbatch"), "train.documents_apart: not set, now true"),
        ] {
            let message = refused(change, &[]).unwrap();
            assert!(message.contains(line) && message.contains("--change train."), "{message}");
            let key = message.rsplit_once("--change ").unwrap().1.to_owned();
            assert_eq!(refused(change, &key.split(',').collect::<Vec<_>>()), None);
            assert_eq!(refused(change, &["train"]), None, "a table stands for what is in it");
            assert!(refused(change, &["train.keep"]).is_some());
        }
        let rates = format!("{BASE}\n[train.optimizer]\nmuon_rate = 0.5");
        let changes = setting_changes(&config(BASE), &config(&rates));
        assert_eq!(
            changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(),
            ["train.optimizer.muon_rate"]
        );
    }

    #[test]
    fn what_changes_nothing_that_is_learnt_is_told_and_let_pass() {
        for change in
            ["evaluate_every = 7", "checkpoint_every = 7", "keep = 7", "recompute = true", "micro_batch = 1"]
        {
            assert_eq!(refused(("batch = 4", &format!("batch = 4\n{change}")), &[]), None);
        }
        assert_eq!(refused(("", ""), &[]), None);
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let config = config(BASE);
        let check =
            |key: &str| check_keys(&[key.to_owned()], &config, &config).map_err(|error| error.to_string());
        assert!(check("train.sede").unwrap_err().contains("--change train.sede"));
        assert!(
            check("train.seed").is_ok() && check("train.schedule").is_ok() && check("data.train").is_ok()
        );
    }
}

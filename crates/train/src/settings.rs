//! What a resumed or continued run changes in its settings.

use std::collections::BTreeMap;
use std::path::Path;

use engram_config::{CheckpointConfig, RowTraining, RunConfig, TrainConfig};
use serde::Serialize;
use toml::{Table, Value};

use crate::error::Error;
use crate::tables::row_optimizer;

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
    differences(&flat(saved), &flat(config))
}

/// Settings by their dotted keys that are others in `after` than in `before`, in the order of the keys.
fn differences(before: &Settings, after: &Settings) -> Vec<SettingChange> {
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

/// Refuses what a continued run has to share with the checkpoint `from`: the model, its texts, and what gives its
/// optimisers' state a meaning.
///
/// # Errors
/// With all keys that differ and both of their values; when the checkpoint is of no training.
pub(crate) fn check_continued(
    saved: &CheckpointConfig,
    config: &RunConfig,
    from: &Path,
) -> Result<(), Error> {
    let Some(train) = &saved.train else {
        return Err(Error::Mismatch(format!(
            "{}: its configuration has no `[train]`, so that it has no optimiser state to continue with; begin with its \
             weights alone (`--from`)",
            from.display()
        )));
    };
    let mut changes = differences(
        &flat_tables(&[("model", table(&saved.model)), ("text", table(&saved.text))]),
        &flat_tables(&[("model", table(&config.model)), ("text", table(&config.text))]),
    );
    changes.extend(state_changes(train, &config.train, config.model.memory.is_some()));
    if changes.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = changes.iter().map(|change| format!("\n  {change}")).collect();
    Err(Error::Mismatch(format!(
        "{}: the state of its optimisers belongs to other settings:{}\nCopy them from the checkpoint's run.toml",
        from.display(),
        lines.concat()
    )))
}

/// Settings that differ and decide what the values of the optimisers' state mean: which moments there are, and over how
/// many steps they average. Rates, decay and clipping are applied to them afterwards.
fn state_changes(saved: &TrainConfig, train: &TrainConfig, has_rows: bool) -> Vec<SettingChange> {
    let all = |train: &TrainConfig| flat_tables(&[("train.optimizer", table(&train.optimizer))]);
    let mut changes = differences(&all(saved), &all(train));
    changes.retain(|change| ["train.optimizer.betas", "train.optimizer.momentum"].contains(&&change.key[..]));
    // A value that is written out is the same as a default.
    if has_rows && row_optimizer(&saved.memory) != row_optimizer(&train.memory) {
        let rows = |rows: &RowTraining| flat_tables(&[("train.memory", table(rows))]);
        let of_state = |change: &SettingChange| {
            !["train.memory.rate_factor", "train.memory.storage"].contains(&&change.key[..])
        };
        changes.extend(differences(&rows(&saved.memory), &rows(&train.memory)).into_iter().filter(of_state));
    }
    changes
}

/// Refuses keys that are no settings of a run: a misspelt one would be silently of no use.
///
/// # Errors
/// With the first of them.
pub(crate) fn check_keys(allowed: &[String], saved: &RunConfig, config: &RunConfig) -> Result<(), Error> {
    let known: Vec<String> = flat(saved).into_keys().chain(flat(config).into_keys()).collect();
    let is_known = |key: &&String| {
        ["data", "data.train", "data.valid", "data.source"].contains(&key.as_str())
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
type Settings = BTreeMap<String, String>;

/// The settings of `[text]` and `[train]`.
fn flat(config: &RunConfig) -> Settings {
    flat_tables(&[("text", table(&config.text)), ("train", table(&config.train))])
}

/// The settings of tables with their keys.
fn flat_tables(tables: &[(&str, Value)]) -> Settings {
    let mut all = BTreeMap::new();
    tables.iter().for_each(|(key, table)| add(key, table, &mut all));
    all
}

fn table(settings: &impl Serialize) -> Value {
    // A valid configuration has no number that TOML lacks.
    Value::Table(Table::try_from(settings).expect("valid settings are TOML"))
}

fn add(key: &str, value: &Value, all: &mut Settings) {
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

    #[test]
    fn a_continued_run_shares_what_the_state_means_and_nothing_else() {
        let memory =
            "[model.memory]\nlayers = [1]\nmax_order = 2\nheads = 1\nrow_width = 4\nrows_per_head = [9]";
        let with = |train: &str| -> RunConfig { config(&format!("{BASE}\n{train}\n{memory}")) };
        let saved = |config: &RunConfig| CheckpointConfig {
            model: config.model.clone(),
            text: config.text.clone(),
            data: None,
            train: Some(config.train.clone()),
        };
        let base = saved(&with("[train.memory]\noptimizer = \"adam\""));
        let refused = |new: &RunConfig| {
            check_continued(&base, new, Path::new("old")).err().map(|error| error.to_string())
        };
        let rows = "[train.memory]\noptimizer = \"adam\"";
        for (train, line) in [
            (format!("{rows}\n[train.optimizer]\nmomentum = 0.5"), "train.optimizer.momentum: 0.9"),
            (format!("{rows}\n[train.optimizer]\nbetas = [0.5, 0.75]"), "now [0.5, 0.75]"),
            (String::new(), "train.memory.optimizer: \"adam\", now \"row_wise_adam\""),
            (format!("{rows}\nbeta1 = 0.5"), "train.memory.beta1: not set, now 0.5"),
            (format!("{rows}\nbias_correction = \"row\""), "train.memory.bias_correction: not set"),
        ] {
            let message = refused(&with(&train)).unwrap();
            assert!(message.contains(line) && message.lines().count() == 3, "{message}");
        }
        for train in [
            rows.to_owned(),
            format!(
                "{rows}\nbeta1 = 0.9\nbias_correction = \"table\"\nrate_factor = 3.0\nstorage = \"mapped\""
            ),
            format!(
                "{rows}\n[train.optimizer]\nmuon_rate = 0.5\nadam_rate = 0.5\nclip = 9.0\nweight_decay = 0.0"
            ),
        ] {
            assert_eq!(refused(&with(&train)), None);
        }
        let mut other = with(rows);
        other.model.width = 32;
        other.model.memory.as_mut().unwrap().seed = 5;
        let message = refused(&other).unwrap();
        assert!(message.contains("model.width: 16, now 32"), "{message}");
        assert!(message.contains("model.memory.seed: 0, now 5"), "{message}");

        let untrained = CheckpointConfig { train: None, ..base.clone() };
        let message = check_continued(&untrained, &with(rows), Path::new("old")).unwrap_err().to_string();
        assert!(message.contains("`[train]`") && message.contains("--from"), "{message}");
    }
}

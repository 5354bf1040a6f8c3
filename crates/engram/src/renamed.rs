//! Options that have another name now. Most old names are refused with the new one; a few that are in many scripts are
//! still taken, with a note.

use std::ffi::OsString;

use crate::failure::refuse;
use crate::note::note;

/// An option that was renamed.
struct Renamed {
    /// Commands that had it.
    commands: &'static [&'static str],
    old: &'static str,
    new: &'static str,
    /// Whether the old name is still taken.
    taken: bool,
}

const fn refused(commands: &'static [&'static str], old: &'static str, new: &'static str) -> Renamed {
    Renamed { commands, old, new, taken: false }
}

const fn taken(commands: &'static [&'static str], old: &'static str, new: &'static str) -> Renamed {
    Renamed { commands, old, new, taken: true }
}

const RENAMED: &[Renamed] = &[
    taken(&["serve"], "--token-cache", "--kv-cache"),
    taken(&["generate"], "--tokens", "--max-tokens"),
    taken(
        &["serve", "chat", "generate", "table bench", "table serve-redis-load", "table serve-redis-remove"],
        "--limit",
        "--row-timeout",
    ),
    refused(&["serve"], "--running", "--max-num-seqs"),
    refused(&["serve"], "--waiting", "--max-queue"),
    refused(&["serve"], "--page", "--block-size"),
    refused(&["serve"], "--prompt-tokens", "--max-num-batched-tokens"),
    refused(&["serve"], "--drafts", "--speculative-tokens"),
    refused(&["serve", "chat", "generate"], "--weights", "--dtype"),
    refused(&["chat"], "--tokens", "--max-tokens"),
    refused(&["serve", "chat", "generate", "table bench"], "--cache", "--row-cache"),
    refused(&["eval tasks", "inspect sensitivity"], "--limit", "--max-records"),
];

/// The arguments that follow the program's name, with the new names of options.
///
/// # Errors
/// An old name that is no longer taken, with the new one.
pub(crate) fn current(arguments: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let words: Vec<_> = arguments.iter().take(2).map(|word| word.to_string_lossy().into_owned()).collect();
    let is_of = |renamed: &&Renamed| {
        renamed.commands.iter().any(|command| {
            let command: Vec<&str> = command.split(' ').collect();
            words.len() >= command.len() && words[..command.len()] == command[..]
        })
    };
    let mine: Vec<&Renamed> = RENAMED.iter().filter(is_of).collect();
    let mut values = false;
    let each = arguments.into_iter().map(|argument| {
        // After `--` come values.
        values |= argument == "--";
        let Some(text) = argument.to_str().filter(|_| !values) else { return Ok(argument) };
        let (option, value) =
            text.split_once('=').map_or((text, None), |(option, value)| (option, Some(value)));
        let Some(Renamed { old, new, taken, .. }) = mine.iter().find(|renamed| renamed.old == option) else {
            return Ok(argument);
        };
        if !taken {
            return refuse(format!("`{old}` is now `{new}`"));
        }
        note(format_args!("note: `{old}` is now `{new}`; the old name will go"));
        Ok(value.map_or_else(|| (*new).into(), |value| format!("{new}={value}").into()))
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn arguments<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<OsString> {
        words.into_iter().map(OsString::from).collect()
    }

    #[test]
    fn every_old_name_is_refused_or_replaced_by_a_new_one_that_exists() {
        let cli = crate::Cli::command();
        for Renamed { commands, old, new, taken } in RENAMED {
            for command in *commands {
                for suffix in ["", "=3"] {
                    let option = format!("{old}{suffix}");
                    let line = || arguments(command.split(' ').chain(["run", &option[..]]));
                    match current(line()) {
                        Ok(found) => {
                            assert!(*taken, "{command} {old} is taken");
                            assert_eq!(*found.last().unwrap(), *format!("{new}{suffix}"), "{command} {old}");
                        }
                        Err(error) => {
                            assert!(!taken && error.to_string().contains(new), "{command} {old}: {error}");
                        }
                    }
                }
                let of = command.split(' ').fold(&cli, |cli, word| cli.find_subcommand(word).unwrap());
                let has = |name: &str| {
                    of.get_arguments().any(|option| option.get_long() == name.strip_prefix("--"))
                };
                assert!(has(new) && !has(old), "{command} {old} {new}");
            }
        }
    }

    #[test]
    fn values_and_other_commands_are_left_alone() {
        for line in [
            &["generate", "run", "--", "--tokens"][..],
            &["eval", "loss", "run", "--tokens", "3"],
            &["table", "info", "--limit"],
            &["table"],
            &[],
        ] {
            let line = arguments(line.iter().copied());
            assert_eq!(current(line.clone()).unwrap(), line);
        }
    }
}

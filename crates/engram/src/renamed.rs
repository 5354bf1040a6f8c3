//! Old names of options are refused with the new name.

use crate::failure::refuse;

/// A command, an option that it had, and the option's new name.
const RENAMED: &[(&str, &str, &str)] = &[
    ("serve", "--running", "--max-num-seqs"),
    ("serve", "--waiting", "--max-queue"),
    ("serve", "--token-cache", "--kv-cache"),
    ("serve", "--page", "--block-size"),
    ("serve", "--prompt-tokens", "--max-num-batched-tokens"),
    ("serve", "--drafts", "--speculative-tokens"),
    ("serve", "--weights", "--dtype"),
    ("chat", "--weights", "--dtype"),
    ("generate", "--weights", "--dtype"),
    ("chat", "--tokens", "--max-tokens"),
    ("generate", "--tokens", "--max-tokens"),
];

/// Refuses old names among the arguments that follow the program's name.
pub(crate) fn check(arguments: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
    let mut arguments = arguments.into_iter();
    let Some(command) = arguments.next() else { return Ok(()) };
    // After `--` come values.
    for argument in arguments.take_while(|argument| argument != "--") {
        let option = argument.split_once('=').map_or(&argument[..], |(option, _)| option);
        if let Some((.., new)) = RENAMED.iter().find(|(of, old, _)| *of == command && *old == option) {
            return refuse(format!("`engram {command} {option}` is now `{new}`"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_old_name_is_refused_with_the_new_one_which_exists() {
        let cli = crate::Cli::command();
        for (command, old, new) in RENAMED {
            for argument in [(*old).to_owned(), format!("{old}=3")] {
                let error = check([(*command).to_owned(), "run".into(), argument]).unwrap_err();
                assert!(error.to_string().contains(new), "{command} {old}: {error}");
            }
            let options: Vec<_> = cli.find_subcommand(command).unwrap().get_arguments().collect();
            let has = |name: &str| options.iter().any(|option| option.get_long() == name.strip_prefix("--"));
            assert!(has(new) && !has(old), "{command} {old} {new}");
        }
        assert!(check(["generate", "run", "--", "--tokens"].map(String::from)).is_ok());
        assert!(check([]).is_ok());
    }
}

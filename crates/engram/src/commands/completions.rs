//! What shells and `man` read of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::print;

/// Print the completions for a shell.
///
/// Bash:  engram completions bash > ~/.local/share/bash-completion/completions/engram
/// Zsh:   engram completions zsh > ~/.zfunc/_engram        (with ~/.zfunc in $fpath)
/// Fish:  engram completions fish > ~/.config/fish/completions/engram.fish
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut crate::Cli::command(), "engram", &mut text);
        print(text)
    }
}

/// Write the manual pages into a folder.
///
///     engram man ~/.local/share/man/man1
///     man engram-serve
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Man {
    /// The folder. It is made if it does not exist.
    folder: PathBuf,
}

impl Man {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let folder = &self.folder;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        clap_mangen::generate_to(crate::Cli::command(), folder)
            .with_context(|| format!("cannot write manual pages into {}", folder.display()))
    }
}

//! The commands in the book and the README are commands that this program has.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;

/// A command in a page, and its first line there.
struct Shown {
    page: PathBuf,
    line: usize,
    command: String,
}

/// The README and the pages of the book. Results show the commands of the commit that made them.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let history = root.join("docs/log.md");
    let mut pages: Vec<PathBuf> = docs.filter(is_page).filter(|page| *page != history).collect();
    pages.push(root.join("README.md"));
    pages
}

/// The commands of a page's code blocks. A line that ends in `\` goes on in the next one.
fn commands(page: &Path) -> Vec<Shown> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut lines = text.lines().enumerate();
    let mut found = Vec::new();
    while let Some((index, line)) = lines.next() {
        let is_code = line.starts_with("    ") || line.starts_with("engram ") || line.starts_with("$ ");
        let mut command = line.trim_start().trim_start_matches("$ ").to_owned();
        if !is_code || !(command.starts_with("engram ") || command.starts_with("cargo run --release -- ")) {
            continue;
        }
        while let Some(start) = command.strip_suffix('\\') {
            let Some((_, next)) = lines.next() else { break };
            command = format!("{start} {}", next.trim());
        }
        found.push(Shown { page: page.to_owned(), line: index + 1, command });
    }
    found
}

/// The words up to a comment, a pipe, a redirection or a job's `&`.
fn words(command: &str) -> Vec<String> {
    let command = command.replacen("cargo run --release --", "engram", 1);
    let uncommented = match command.find(" #") {
        Some(end) => &command[..end],
        None => &command,
    };
    let words = shell_words::split(uncommented).unwrap_or_else(|error| panic!("{command}: {error}"));
    words.into_iter().take_while(|word| !matches!(&word[..], "|" | ">" | "2>" | "&" | "&&")).collect()
}

#[test]
fn every_command_of_the_book_is_one_that_this_program_has() {
    let shown: Vec<Shown> = pages().iter().flat_map(|page| commands(page)).collect();
    assert!(shown.len() > 30, "only {} commands were found", shown.len());
    let wrong: Vec<String> = shown
        .iter()
        .filter_map(|Shown { page, line, command }| {
            let words = words(command);
            let given: Vec<OsString> = words[1..].iter().map(OsString::from).collect();
            let problem = match crate::renamed::current(given.clone()) {
                Err(error) => error.to_string(),
                Ok(current) if current != given => "it has the old name of an option".to_owned(),
                Ok(_) => crate::Cli::try_parse_from(&words).err()?.to_string(),
            };
            Some(format!("{}:{line}: {command}\n  {problem}", page.display()))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_wrong_command_is_noticed() {
    for wrong in ["engram trian my.toml", "engram train my.toml --outt runs/my"] {
        assert!(crate::Cli::try_parse_from(words(wrong)).is_err(), "{wrong}");
    }
    assert_eq!(words("engram params my.toml   # a comment"), ["engram", "params", "my.toml"]);
    assert_eq!(words("engram params my.toml | less"), ["engram", "params", "my.toml"]);
}

//! The origin of a result: program and machine.

/// The program's version and commit.
pub(crate) fn program() -> String {
    format!("engram {}, commit {}", env!("CARGO_PKG_VERSION"), env!("ENGRAM_COMMIT"))
}

/// The command, quoted for a shell, as far as its arguments are Unicode.
pub(crate) fn command() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy()));
    std::iter::once("engram".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// A word, quoted for a shell.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_alphanumeric() || "-_./,:=+@%".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The processor, its cores, and the memory, as far as the system tells.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut machine = format!("{cores} cores");
    if let Some(name) = value("/proc/cpuinfo", "model name") {
        machine += &format!(" of {name}");
    }
    let kibibytes = value("/proc/meminfo", "MemTotal");
    let kibibytes = kibibytes.as_deref().and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    if let Some(kibibytes) = kibibytes {
        machine += &format!(", {} of memory", crate::number::bytes(kibibytes << 10));
    }
    machine
}

/// The first value of a key in a file of `key : value` lines.
fn value(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        for word in ["--limit", "runs/my-run", "a=1,2", "Ähre"] {
            assert_eq!(quoted(word), word);
        }
        assert_eq!(quoted("my run"), "'my run'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!([quoted(""), quoted("$HOME"), quoted("a*")], ["''", "'$HOME'", "'a*'"]);
    }

    #[test]
    fn the_program_and_the_machine_are_named() {
        assert!(program().starts_with("engram ") && program().contains("commit "), "{}", program());
        assert!(machine().contains("cores"), "{}", machine());
    }
}

//! Commands to copy into a shell.

use std::path::Path;

/// A path as one word of a command line, quoted if it holds more than letters, digits and the usual signs.
pub(crate) fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/\\:._-+,=@%~".contains(c);
    let quote = if cfg!(windows) { '"' } else { '\'' };
    match !text.is_empty() && text.chars().all(plain) && (cfg!(windows) || !text.contains('\\')) {
        true => text,
        false => format!("{quote}{}{quote}", text.replace('\'', if cfg!(windows) { "'" } else { r"'\''" })),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_word_back() {
        for path in ["runs/my-1", "my runs/a", "it's", "", "a$b", r"a\b", "größe", "a;b", "~", "a\"b"] {
            let echo = format!("printf %s {}", word(Path::new(path)));
            let output = std::process::Command::new("sh").args(["-c", &echo]).output().unwrap();
            let expected = if path == "~" { std::env::var("HOME").unwrap() } else { path.to_owned() };
            assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        }
        assert_eq!(word(Path::new("runs/my-1")), "runs/my-1");
    }
}

//! Records the commit that the program is built from, so that results can name it.

use std::path::Path;
use std::process::Command;

fn main() {
    // A source archive has no history; the commit is then "unknown".
    let commit = git(&["describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]);
    println!("cargo::rustc-env=ENGRAM_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    println!("cargo::rerun-if-changed=build.rs");
    // The log of HEAD changes with every commit and checkout.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
    println!("cargo::rerun-if-changed=..");
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

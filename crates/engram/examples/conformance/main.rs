//! Compares Engram with values that its published demonstration code computed.
//!
//! ```text
//! cargo run --release --example conformance -- [--composed | --cuda] DIR
//! ```
//!
//! DIR holds files of the demonstration's values, any of these kinds:
//!
//! * `module_*.safetensors`: a memory module with its weights, input, output and every gradient. Floats must agree
//!   within 1e-5 + 1e-4·|x| in f32, row ids exactly. By default the modules use the fused CPU operations, as in
//!   training. `--composed` uses Burn's primitives, as on other devices. They add in a different order, which matters
//!   where a gate's score is so near 0 that the last bits of a sum decide the slope of its root. `--cuda` uses the
//!   first NVIDIA GPU (needs a build with `--features cuda`).
//! * `addressing_*.json`: multipliers, primes and row ids of a configuration. They must agree exactly.
//! * `*_compression.npy`: the class of every token id, used to map token ids. If DIR also holds the `tokenizer.json`
//!   that the classes were made from, they are checked against it.
//!
//! Prints a line per tensor with its largest error. Exits with 0 if all agree, 1 if something does not, and 2 if
//! the files cannot be used.

mod addressing;
mod module;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use engram_address::Vocabulary;

use crate::module::ComputePath;
use crate::report::Report;

const USAGE: &str = "usage: conformance [--composed | --cuda] DIR
  DIR holds module_*.safetensors, addressing_*.json or *_compression.npy files of the demonstration code's values
  --composed  compute modules in Burn's primitives, not in the fused operations of a CPU
  --cuda      compute modules on the first NVIDIA GPU; needs a build with --features cuda";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let (path, folder) = match &arguments[..] {
        [help] if help == "--help" || help == "-h" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [folder] => (ComputePath::Fused, folder),
        [option, folder] if option == "--composed" => (ComputePath::Composed, folder),
        #[cfg(feature = "cuda")]
        [option, folder] if option == "--cuda" => (ComputePath::Cuda, folder),
        #[cfg(not(feature = "cuda"))]
        [option, _] if option == "--cuda" => {
            eprintln!("error: --cuda: this program was built without it; build with `--features cuda`");
            return ExitCode::from(2);
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut report = Report::default();
    match check(Path::new(folder), path, &mut report) {
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
        Ok(()) if report.misses() > 0 => {
            println!("{} of {} tensors miss", report.misses(), report.lines());
            ExitCode::FAILURE
        }
        Ok(()) => {
            println!("all {} tensors agree", report.lines());
            ExitCode::SUCCESS
        }
    }
}

/// Checks every file of `folder` that this example knows.
///
/// # Errors
/// When the folder holds no such file, or one of them cannot be read.
fn check(folder: &Path, compute: ComputePath, report: &mut Report) -> Result<()> {
    let files = Files::of(folder)?;
    let vocabulary = match &files.compression {
        Some(path) => Some(compression(path, folder, report).with_context(|| path.display().to_string())?),
        None => None,
    };
    for path in &files.addressings {
        addressing::check(path, vocabulary.as_ref(), report).with_context(|| path.display().to_string())?;
    }
    for path in &files.modules {
        module::check(path, vocabulary.as_ref(), compute, report)
            .with_context(|| path.display().to_string())?;
    }
    if report.lines() == 0 {
        bail!("{}: its files hold nothing to check", folder.display());
    }
    Ok(())
}

/// The classes of the compression file, checked against the folder's tokenizer if it has one.
fn compression(path: &Path, folder: &Path, report: &mut Report) -> Result<Vocabulary> {
    let classes = addressing::npy_i32(path)?;
    report.file(path);
    let tokenizer = folder.join("tokenizer.json");
    if tokenizer.exists() {
        let found = Vocabulary::from_tokenizer_file(&tokenizer).context("tokenizer.json")?;
        report.integers("classes", found.as_slice(), &classes);
    } else {
        report.note("classes", "no tokenizer.json beside it: taken as they are");
    }
    Ok(Vocabulary::from_classes(classes)?)
}

/// What a folder holds, sorted by name.
#[derive(Default)]
struct Files {
    compression: Option<PathBuf>,
    addressings: Vec<PathBuf>,
    modules: Vec<PathBuf>,
}

impl Files {
    fn of(folder: &Path) -> Result<Self> {
        let entries =
            std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let mut paths = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()
            .with_context(|| format!("cannot list {}", folder.display()))?;
        paths.sort();
        let mut files = Self::default();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("module_") && name.ends_with(".safetensors") {
                files.modules.push(path);
            } else if name.starts_with("addressing_") && name.ends_with(".json") {
                files.addressings.push(path);
            } else if name.ends_with("_compression.npy")
                && let Some(first) = files.compression.replace(path)
            {
                bail!(
                    "{} holds two compressions, {} being one: leave one",
                    folder.display(),
                    first.display()
                );
            }
        }
        if files.compression.is_none() && files.addressings.is_empty() && files.modules.is_empty() {
            bail!(
                "{} holds no module_*.safetensors, addressing_*.json or *_compression.npy",
                folder.display()
            );
        }
        Ok(files)
    }
}

//! Models and files of data sets on the Hugging Face hub.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use engram_eval::tasks::{Error, HubData};
use engram_import::{Hub, HubKind, HubModel, HubRepository};

use crate::failure::{Interrupted, refuse};
use crate::files::new_file;
use crate::note::note;
use crate::progress::Passage;

/// Where the model `named` lies on this machine: `named` itself, or, for a name such as `hf:org/name`, its folder or file
/// in the hub's cache. What the cache lacks is downloaded.
///
/// # Errors
/// A name of another form; a hub that cannot be reached or does not have the model.
pub(crate) fn local(named: &Path) -> anyhow::Result<PathBuf> {
    let Some(model) = named.to_str().and_then(HubModel::parse) else { return Ok(named.to_owned()) };
    let model = model?;
    let mut passage: Option<(String, Passage)> = None;
    let found = Hub::of_environment().model(&model, &mut |file, done, total| {
        let total = total.unwrap_or(done);
        let (_, passage) = match passage.take() {
            Some((of, current)) if of == file => passage.insert((of, current)),
            _ => passage.insert((file.to_owned(), Passage::new(file, total, 1))),
        };
        passage.show(done, total)
    });
    match found {
        Err(engram_import::Error::Interrupted) => {
            Err(Interrupted(format!(": {} is not downloaded", named.display())).into())
        }
        found => Ok(found?),
    }
}

/// Writes the records that `data` names to `path`, which does not exist yet. Creates its folder.
pub(crate) fn fetch(hub: &Hub, data: &HubData, path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // The name of the temporary file keeps the ending, which tells the format.
    let ending = Path::new(data.file()).extension().map_or(String::new(), |e| format!(".{}", e.display()));
    let mut whole = new_file(folder, &ending)?;
    let repository = HubRepository {
        kind: HubKind::Dataset,
        name: data.repository().to_owned(),
        revision: data.revision().to_owned(),
    };
    let source = match hub.cached(&repository, data.file()) {
        Some(cached) => {
            let copied = File::open(&cached).and_then(|mut file| std::io::copy(&mut file, &mut whole));
            copied.with_context(|| format!("cannot copy {} to {}", cached.display(), folder.display()))?;
            cached.display().to_string()
        }
        None => {
            download(hub, &repository, data.file(), &mut whole)?;
            hub.url(&repository, data.file())
        }
    };
    let records = data.records(whole.path()).or_else(|error| match error {
        // Name the downloaded file, not the temporary one.
        Error::Line { line, problem, .. } => refuse(format!("{source}:{line}: {problem}")),
        error => Err(error.into()),
    });
    let written = match records? {
        Some(lines) => {
            let mut file = new_file(folder, "")?;
            file.write_all(lines.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
            file
        }
        None => whole,
    };
    let synced = written.as_file().sync_all();
    synced.with_context(|| format!("cannot write {}", path.display()))?;
    written.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    note(format_args!("wrote {} from {source}", path.display()));
    Ok(())
}

fn download(hub: &Hub, repository: &HubRepository, file: &str, to: &mut dyn Write) -> anyhow::Result<()> {
    let mut passage = Passage::new(file, 0, 1);
    let downloaded =
        hub.download(repository, file, to, &mut |_, done, total| passage.show(done, total.unwrap_or(done)));
    match downloaded {
        Err(engram_import::Error::Interrupted) => {
            Err(Interrupted(format!(": {file} is not downloaded")).into())
        }
        other => Ok(other?),
    }
}

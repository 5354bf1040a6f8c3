//! Files of data sets on the Hugging Face hub.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use engram_eval::tasks::{Error, HubData};
use tempfile::NamedTempFile;

use crate::failure::{Interrupted, refuse};
use crate::files::new_file;
use crate::note::note;
use crate::progress::Passage;

/// The hub, or a mirror of it, as the environment says: `HF_ENDPOINT`, `HF_TOKEN`, and the proxies that programs usually
/// heed.
pub(crate) struct Hub {
    endpoint: String,
    token: Option<String>,
    /// What the hub's own programs have downloaded, if there is a home to have it in.
    cache: Option<PathBuf>,
    agent: ureq::Agent,
}

/// How long it may take to reach the hub, and to be answered. The data themselves may take their time.
const ANSWER: Duration = Duration::from_secs(60);

/// Bytes read at a time.
const PIECE: usize = 1 << 16;

impl Hub {
    /// As the environment says.
    pub(crate) fn of_environment() -> Self {
        let value = |name: &str| {
            let value = std::env::var(name).ok()?;
            Some(value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let endpoint = value("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let home = || {
            let home = value("HF_HOME").map(PathBuf::from);
            home.or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))
        };
        let cache = value("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home()?.join("hub")));
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(ANSWER))
            .timeout_recv_response(Some(ANSWER))
            .user_agent(concat!("engram/", env!("CARGO_PKG_VERSION")))
            .build();
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Self { endpoint, token: value("HF_TOKEN"), cache, agent: config.into() }
    }

    /// Puts the records that `data` says into `path`, which is not there yet; its folder is made.
    pub(crate) fn fetch(&self, data: &HubData, path: &Path) -> anyhow::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // Its name tells the format of what is read from it.
        let ending =
            Path::new(data.file()).extension().map_or(String::new(), |e| format!(".{}", e.display()));
        let mut whole = new_file(folder, &ending)?;
        let source = match self.cached(data) {
            Some(cached) => {
                let copied = File::open(&cached).and_then(|mut file| std::io::copy(&mut file, &mut whole));
                copied
                    .with_context(|| format!("cannot copy {} to {}", cached.display(), folder.display()))?;
                cached.display().to_string()
            }
            None => {
                self.download(data, &mut whole)?;
                self.url(data)
            }
        };
        let records = data.records(whole.path()).or_else(|error| match error {
            // The file under its own name.
            Error::Line { line, problem, .. } => refuse(format!("{source}:{line}: {problem}")),
            error => Err(error.into()),
        });
        let written = match records? {
            Some(lines) => {
                let mut file = new_file(folder, "")?;
                file.write_all(lines.as_bytes())
                    .with_context(|| format!("cannot write {}", path.display()))?;
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

    fn url(&self, data: &HubData) -> String {
        format!(
            "{}/datasets/{}/resolve/{}/{}",
            self.endpoint,
            data.repository(),
            // A revision such as refs/convert/parquet is one part of the path.
            escaped(data.revision(), ""),
            escaped(data.file(), "/")
        )
    }

    /// The file in the cache of the hub's own programs, where it is there.
    fn cached(&self, data: &HubData) -> Option<PathBuf> {
        let repository = format!("datasets--{}", data.repository().replace('/', "--"));
        let repository = self.cache.as_ref()?.join(repository);
        let commit = std::fs::read_to_string(repository.join("refs").join(data.revision()));
        let commit = commit.map_or_else(|_| data.revision().to_owned(), |commit| commit.trim().to_owned());
        Some(repository.join("snapshots").join(commit).join(data.file())).filter(|file| file.is_file())
    }

    fn download(&self, data: &HubData, to: &mut NamedTempFile) -> anyhow::Result<()> {
        let url = self.url(data);
        let mut request = self.agent.get(&url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let elsewhere = || {
            let (repository, revision, file) = (data.repository(), data.revision(), data.file());
            format!(
                "cannot download {url}. Without a network, run `hf download --repo-type dataset {repository} --revision \
                 {revision} {file}` on a machine that has one, and copy its cache (~/.cache/huggingface, or name it by \
                 HF_HOME) to this one; HF_ENDPOINT names a mirror of the hub"
            )
        };
        let mut response = request.call().with_context(elsewhere)?;
        let status = response.status();
        match status.as_u16() {
            200 => {}
            401 | 403 => {
                return refuse(format!(
                    "{url}: the hub wants to know who asks ({status}): accept the data set's conditions on its page, and \
                     set HF_TOKEN to a token of yours"
                ));
            }
            404 => {
                return refuse(format!(
                    "{url}: not there ({status}): check `repository`, `file` and `revision` in [hub]; a private data set \
                     needs HF_TOKEN"
                ));
            }
            _ => bail!("{url}: the hub answered {status}: try again later"),
        }
        let total = response.body().content_length();
        let mut body = response.body_mut().as_reader();
        let mut passage = Passage::new(data.file(), total.unwrap_or(0), 1);
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        loop {
            let read = body.read(&mut piece).with_context(elsewhere)?;
            if read == 0 {
                break;
            }
            to.write_all(&piece[..read]).with_context(|| format!("cannot write {}", to.path().display()))?;
            done += read as u64;
            if passage.show(done, total.unwrap_or(done)).is_break() {
                return Err(Interrupted(format!(": {} is not downloaded", data.file())).into());
            }
        }
        match total {
            Some(total) if done < total => bail!("{url}: only {done} of {total} bytes came: try again"),
            _ => Ok(()),
        }
    }
}

/// `text` as a part of a URL: all but letters, digits, `-`, `_`, `.`, `~` and `kept` escaped.
fn escaped(text: &str, kept: &str) -> String {
    let is_kept =
        |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || kept.as_bytes().contains(&byte);
    let one = |byte: u8| if is_kept(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn parts_of_a_url_are_escaped() {
        assert_eq!(escaped("refs/convert/parquet", ""), "refs%2Fconvert%2Fparquet");
        assert_eq!(escaped("a b/é.jsonl", "/"), "a%20b/%C3%A9.jsonl");
    }
}

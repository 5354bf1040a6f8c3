//! Files on the Hugging Face hub, or on a mirror of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Result};

/// The hub, or a mirror of it, as the environment says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`,
/// `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, and the proxies that programs usually heed.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    /// What the hub's own programs have downloaded, if there is a home to have it in.
    cache: Option<PathBuf>,
    offline: bool,
    agent: ureq::Agent,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubKind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRepository {
    /// What it holds.
    pub kind: HubKind,
    /// `organisation/name`.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// A model on the hub, as commands name it: `hf:org/name`, `hf:org/name@revision`, `hf:org/name/file.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    /// Where it lies.
    pub repository: HubRepository,
    /// One file of the repository, where it is named.
    pub file: Option<String>,
}

/// How far a download has come: the file, the bytes done, and those in all where they are known. It may end it.
pub type Download<'a> = dyn FnMut(&str, u64, Option<u64>) -> ControlFlow<()> + 'a;

/// How long it may take to reach the hub, and to be answered. The data themselves may take their time.
const ANSWER: Duration = Duration::from_secs(60);

/// Bytes read at a time.
const PIECE: usize = 1 << 16;

/// Largest list of files that is read, in bytes.
const LONGEST_LIST: u64 = 16 << 20;

/// What begins the name of a model on the hub.
const PREFIX: &str = "hf:";

/// Files of a model beside its weights.
const BESIDE: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
const INDEX: &str = "model.safetensors.index.json";

impl HubModel {
    /// Reads a name that begins with `hf:`; none where `text` does not.
    ///
    /// # Errors
    /// What is not a name of this form.
    pub fn parse(text: &str) -> Option<Result<Self>> {
        let name = text.strip_prefix(PREFIX)?;
        let wrong = || {
            let problem = "not the name of a model on the hub: write hf:organisation/name, with @revision or /file.gguf";
            Err(Error::model(Path::new(text), problem))
        };
        let (place, revision) = name.split_once('@').unwrap_or((name, "main"));
        let mut parts = place.splitn(3, '/');
        let (Some(organisation), Some(model)) = (parts.next(), parts.next()) else { return Some(wrong()) };
        let is_name = |part: &str| {
            let plain = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            plain && !part.is_empty() && part != "." && part != ".."
        };
        let file = parts.next();
        let is_file = file.is_none_or(is_inner_path);
        if !(is_name(organisation) && is_name(model) && is_file && is_inner_path(revision)) {
            return Some(wrong());
        }
        let repository = HubRepository {
            kind: HubKind::Model,
            name: format!("{organisation}/{model}"),
            revision: revision.to_owned(),
        };
        Some(Ok(Self { repository, file: file.map(str::to_owned) }))
    }
}

/// Whether a path stays below where it begins.
fn is_inner_path(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !path.contains(['\\', '\0', ':'])
}

impl HubRepository {
    /// Its folder in a cache.
    fn folder(&self) -> String {
        let kind = match self.kind {
            HubKind::Model => "models",
            HubKind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.name.replace('/', "--"))
    }
}

impl Hub {
    /// As the environment says.
    pub fn of_environment() -> Self {
        Self::of(|name| std::env::var(name).ok())
    }

    /// As these variables say.
    fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let value = |name: &str| {
            let value = variable(name)?.trim().to_owned();
            Some(value).filter(|value| !value.is_empty())
        };
        let endpoint = value("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let home = value("HF_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")));
        let cache = value("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
        let kept = || {
            let path =
                value("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("token")))?;
            Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let token = value("HF_TOKEN").or_else(kept);
        let offline =
            value("HF_HUB_OFFLINE").is_some_and(|value| !matches!(&value[..], "0" | "false" | "no"));
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(ANSWER))
            .timeout_recv_response(Some(ANSWER))
            .user_agent(concat!("engram/", env!("CARGO_PKG_VERSION")))
            .build();
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Self { endpoint, token, cache, offline, agent: config.into() }
    }

    /// Where a file of a repository lies.
    pub fn url(&self, repository: &HubRepository, file: &str) -> String {
        let kind = match repository.kind {
            HubKind::Model => "",
            HubKind::Dataset => "datasets/",
        };
        format!(
            "{}/{kind}{}/resolve/{}/{}",
            self.endpoint,
            repository.name,
            // A revision such as refs/convert/parquet is one part of the path.
            escaped(&repository.revision, ""),
            escaped(file, "/")
        )
    }

    /// A file in the cache of the hub's own programs, where it is there.
    pub fn cached(&self, repository: &HubRepository, file: &str) -> Option<PathBuf> {
        Some(self.snapshot(repository)?.join(file)).filter(|file| file.is_file())
    }

    /// Downloads a file to the end of `to`.
    ///
    /// # Errors
    /// When the hub cannot be reached, refuses, or breaks off; or `progress` breaks.
    pub fn download(
        &self,
        repository: &HubRepository,
        file: &str,
        to: &mut dyn Write,
        progress: &mut Download<'_>,
    ) -> Result<()> {
        let url = self.url(repository, file);
        let mut response = self.get(&url, repository, file)?;
        let total = response.body().content_length();
        let mut body = response.body_mut().as_reader();
        let (mut done, mut piece) = (0, vec![0; PIECE]);
        loop {
            let read = body.read(&mut piece);
            let read = read.map_err(|error| self.unreachable(&url, repository, file, &error))?;
            if read == 0 {
                break;
            }
            to.write_all(&piece[..read]).map_err(Error::file("write the download of", file))?;
            done += read as u64;
            if progress(file, done, total).is_break() {
                return Err(Error::Interrupted);
            }
        }
        match total {
            Some(total) if done < total => {
                let problem = format!("only {done} of {total} bytes came: try again");
                Err(Error::Hub { url, problem, is_input: false })
            }
            _ => Ok(()),
        }
    }

    /// The files of a model, in the cache of the hub's own programs; what is missing there is downloaded to it. Gives
    /// the folder of the model, or the one file that `model` names.
    ///
    /// # Errors
    /// When there is no place for a cache, the hub cannot be reached or refuses, the repository has no safetensors, or
    /// `progress` breaks.
    pub fn model(&self, model: &HubModel, progress: &mut Download<'_>) -> Result<PathBuf> {
        let repository = &model.repository;
        if let Some(there) = self.complete(model)? {
            return Ok(there);
        }
        let list = self.list(repository)?;
        let Some(cache) = &self.cache else {
            let problem = "there is no folder to keep it in: set HF_HOME".into();
            return Err(Error::Hub { url: self.endpoint.clone(), problem, is_input: true });
        };
        let (place, at) = (
            cache.join(repository.folder()),
            HubRepository { revision: list.sha.clone(), ..repository.clone() },
        );
        let folder = place.join("snapshots").join(&list.sha);
        let names: BTreeSet<&str> = list.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        if let Some(file) = &model.file {
            if !names.contains(file.as_str()) {
                let ggufs: Vec<&str> = names.iter().filter(|name| name.ends_with(".gguf")).copied().collect();
                return Err(self.not_there(repository, file, &ggufs));
            }
            self.fetch(&at, file, &folder, progress)?;
        } else {
            for name in self.wanted(&at, &names, &folder, progress)? {
                self.fetch(&at, &name, &folder, progress)?;
            }
        }
        // The revision leads to the commit only when all is there.
        let reference = place.join("refs").join(&repository.revision);
        if repository.revision != list.sha {
            let above = reference.parent().unwrap_or(&place);
            fs::create_dir_all(above).map_err(Error::file("create", above))?;
            fs::write(&reference, &list.sha).map_err(Error::file("write", &reference))?;
        }
        Ok(model.file.as_ref().map_or(folder.clone(), |file| folder.join(file)))
    }

    /// Names of the files that make a model; its index is downloaded to be read.
    fn wanted(
        &self,
        repository: &HubRepository,
        names: &BTreeSet<&str>,
        folder: &Path,
        progress: &mut Download<'_>,
    ) -> Result<Vec<String>> {
        let mut wanted: Vec<String> =
            BESIDE.iter().filter(|name| names.contains(**name)).map(|name| (*name).to_owned()).collect();
        if names.contains(INDEX) {
            self.fetch(repository, INDEX, folder, progress)?;
            wanted.extend(shards(&folder.join(INDEX))?);
        } else if names.contains("model.safetensors") {
            wanted.push("model.safetensors".into());
        } else {
            let models =
                names.iter().filter(|name| name.starts_with("model") && name.ends_with(".safetensors"));
            wanted.extend(models.map(|name| (*name).to_owned()));
        }
        if !wanted.iter().any(|name| name.ends_with(".safetensors")) || !names.contains("config.json") {
            let ggufs: Vec<&str> = names.iter().filter(|name| name.ends_with(".gguf")).copied().collect();
            return Err(self.not_there(repository, "config.json with safetensors", &ggufs));
        }
        Ok(wanted)
    }

    fn not_there(&self, repository: &HubRepository, what: &str, ggufs: &[&str]) -> Error {
        let name = &repository.name;
        let others = match ggufs {
            [] => String::new(),
            files => format!(
                "; name one of its GGUF files: hf:{name}/{}",
                files.join(format!(", hf:{name}/").as_str())
            ),
        };
        let url = format!("{}/{name}", self.endpoint);
        Error::Hub { url, problem: format!("there is no {what}{others}"), is_input: true }
    }

    /// The model in the cache, where all of it is there.
    fn complete(&self, model: &HubModel) -> Result<Option<PathBuf>> {
        let Some(folder) = self.snapshot(&model.repository) else { return Ok(None) };
        if let Some(file) = &model.file {
            return Ok(Some(folder.join(file)).filter(|file| file.is_file()));
        }
        let index = folder.join(INDEX);
        let weights = match index.is_file() {
            true => shards(&index)?,
            false => ["model.safetensors".to_owned()].into(),
        };
        let all = ["config.json", "tokenizer.json"].map(str::to_owned).into_iter().chain(weights);
        let is_there = all.into_iter().all(|name| folder.join(name).is_file());
        Ok(is_there.then_some(folder))
    }

    /// The folder of a revision in the cache.
    fn snapshot(&self, repository: &HubRepository) -> Option<PathBuf> {
        let place = self.cache.as_ref()?.join(repository.folder());
        let commit = fs::read_to_string(place.join("refs").join(&repository.revision));
        let commit = commit.map_or_else(|_| repository.revision.clone(), |commit| commit.trim().to_owned());
        Some(place.join("snapshots").join(commit)).filter(|folder| folder.is_dir())
    }

    /// Downloads a file into a folder, unless it is there; it appears whole or not at all.
    fn fetch(
        &self,
        at: &HubRepository,
        name: &str,
        folder: &Path,
        progress: &mut Download<'_>,
    ) -> Result<()> {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(());
        }
        let above = path.parent().unwrap_or(folder);
        fs::create_dir_all(above).map_err(Error::file("create", above))?;
        let part = tempfile::Builder::new().prefix(".part-").tempfile_in(above);
        let mut part = part.map_err(Error::file("write to", above))?;
        self.download(at, name, &mut part, progress)?;
        part.as_file().sync_all().map_err(Error::file("write", &path))?;
        part.persist(&path).map_err(|error| Error::file("write", &path)(error.error))?;
        Ok(())
    }

    fn list(&self, repository: &HubRepository) -> Result<List> {
        let (name, revision) = (&repository.name, escaped(&repository.revision, ""));
        let url = format!("{}/api/models/{name}/revision/{revision}", self.endpoint);
        let mut response = self.get(&url, repository, "")?;
        let text = response.body_mut().with_config().limit(LONGEST_LIST).read_to_string();
        let text = text.map_err(|error| self.unreachable(&url, repository, "", &error))?;
        let list: List = serde_json::from_str(&text).map_err(|error| {
            let problem = format!("the answer is not a list of files: {error}");
            Error::Hub { url: url.clone(), problem, is_input: false }
        })?;
        let is_commit = !list.sha.is_empty() && list.sha.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_commit || !list.siblings.iter().all(|file| is_inner_path(&file.rfilename)) {
            let problem = "the answer names files or a commit that are none".into();
            return Err(Error::Hub { url, problem, is_input: false });
        }
        Ok(list)
    }

    fn get(
        &self,
        url: &str,
        repository: &HubRepository,
        file: &str,
    ) -> Result<ureq::http::Response<ureq::Body>> {
        if self.offline {
            let problem = "is not in the cache, and HF_HUB_OFFLINE is set".into();
            return Err(Error::Hub { url: url.to_owned(), problem, is_input: true });
        }
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|error| self.unreachable(url, repository, file, &error))?;
        let status = response.status();
        let (problem, is_input) = match status.as_u16() {
            200 => return Ok(response),
            401 | 403 => (
                format!(
                    "the hub wants to know who asks ({status}): check the name, accept the conditions on its page, and \
                     set HF_TOKEN to a token of yours"
                ),
                true,
            ),
            404 => {
                let where_named = match repository.kind {
                    HubKind::Dataset => {
                        "check `repository`, `file` and `revision` in [hub]; a private data set needs HF_TOKEN"
                    }
                    HubKind::Model => "check the name and the revision; a private model needs HF_TOKEN",
                };
                (format!("not there ({status}): {where_named}"), true)
            }
            _ => (format!("the hub answered {status}: try again later"), false),
        };
        Err(Error::Hub { url: url.to_owned(), problem, is_input })
    }

    fn unreachable(
        &self,
        url: &str,
        repository: &HubRepository,
        file: &str,
        error: &dyn std::fmt::Display,
    ) -> Error {
        let HubRepository { kind, name, revision } = repository;
        let kind = if *kind == HubKind::Dataset { " --repo-type dataset" } else { "" };
        let file = if file.is_empty() { String::new() } else { format!(" {file}") };
        let problem = format!(
            "cannot download it: {error}. Without a network, run `hf download{kind} {name} --revision {revision}{file}` on \
             a machine that has one, and copy its cache (~/.cache/huggingface, or name it by HF_HOME) to this one; \
             HF_ENDPOINT names a mirror of the hub"
        );
        Error::Hub { url: url.to_owned(), problem, is_input: false }
    }
}

/// What the hub says of a revision.
#[derive(Debug, Deserialize)]
struct List {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let text = fs::read_to_string(index).map_err(Error::read(index))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let Index { weight_map } = serde_json::from_str(text).map_err(|error| Error::model(index, error))?;
    let files: BTreeSet<String> = weight_map.into_values().collect();
    match files.iter().find(|file| !is_inner_path(file) || file.contains('/')) {
        Some(file) => Err(Error::model(index, format!("`{file}` is not the name of a file in this folder"))),
        None => Ok(files),
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
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;

    /// A hub in this process: answers by path, and who asked for what.
    fn serve(answers: HashMap<String, String>) -> (String, Asked) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Asked::default();
        let seen = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(&stream).lines().map(std::result::Result::unwrap);
                let lines: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let path = lines[0].split(' ').nth(1).unwrap().to_owned();
                let who = lines.iter().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
                });
                let (status, body) =
                    answers.get(&path).map_or(("404 Not Found", ""), |body| ("200 OK", body.as_str()));
                seen.lock().unwrap().push((path, who));
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                stream.write_all((head + body).as_bytes()).unwrap();
            }
        });
        (address, asked)
    }

    fn hub(endpoint: &str, home: &Path, token: Option<&str>) -> Hub {
        Hub::of(|name| match name {
            "HF_ENDPOINT" => Some(endpoint.to_owned()),
            "HF_HOME" => Some(home.display().to_string()),
            "HF_TOKEN" => token.map(str::to_owned),
            _ => None,
        })
    }

    fn model(name: &str) -> HubModel {
        HubModel::parse(name).unwrap().unwrap()
    }

    fn go_on(_: &str, _: u64, _: Option<u64>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn answers(files: &[(&str, &str)]) -> HashMap<String, String> {
        let siblings: Vec<String> =
            files.iter().map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}")).collect();
        let list = format!("{{\"sha\": \"0123abcd\", \"siblings\": [{}]}}", siblings.join(", "));
        let mut answers = HashMap::from([("/api/models/some/one/revision/main".to_owned(), list)]);
        let path = |name: &str| format!("/some/one/resolve/0123abcd/{name}");
        answers.extend(files.iter().map(|(name, body)| (path(name), (*body).to_owned())));
        answers
    }

    #[test]
    fn names_of_models() {
        assert!(HubModel::parse("runs/model").is_none());
        let parsed = model("hf:Qwen/Qwen3-0.6B@v1.0");
        assert_eq!(
            (&parsed.repository.name[..], &parsed.repository.revision[..]),
            ("Qwen/Qwen3-0.6B", "v1.0")
        );
        assert_eq!(parsed.file, None);
        assert_eq!(model("hf:some/one/sub/x-Q4_K_M.gguf").file.as_deref(), Some("sub/x-Q4_K_M.gguf"));
        for wrong in
            ["hf:", "hf:one", "hf:/one", "hf:some/", "hf:../one", "hf:some/one/../x", "hf:some/one@../x"]
        {
            let error = HubModel::parse(wrong).unwrap().unwrap_err().to_string();
            assert!(error.contains("not the name of a model on the hub"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_model_is_downloaded_once_to_the_usual_cache() {
        let index = "{\"weight_map\": {\"a\": \"model-1.safetensors\", \"b\": \"model-2.safetensors\"}}";
        let files = [
            ("config.json", "{}"),
            ("tokenizer.json", "tokens"),
            (INDEX, index),
            ("model-1.safetensors", "one"),
            ("model-2.safetensors", "two"),
            ("pytorch_model.bin", "not wanted"),
        ];
        let (endpoint, asked) = serve(answers(&files));
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "kept\n").unwrap();
        let folder = hub(&endpoint, home.path(), None).model(&model("hf:some/one"), &mut go_on).unwrap();
        assert_eq!(folder, home.path().join("hub/models--some--one/snapshots/0123abcd"));
        assert_eq!(fs::read_to_string(folder.join("model-2.safetensors")).unwrap(), "two");
        assert!(!folder.join("pytorch_model.bin").exists());
        let seen = std::mem::take(&mut *asked.lock().unwrap());
        assert_eq!(seen.len(), 6, "{seen:?}");
        assert!(seen.iter().all(|(_, who)| who.as_deref() == Some("Bearer kept")), "{seen:?}");
        // The second time, nothing is asked for; without a network either.
        let offline = hub("http://127.0.0.1:1", home.path(), Some("other"));
        assert_eq!(offline.model(&model("hf:some/one"), &mut go_on).unwrap(), folder);
        assert!(asked.lock().unwrap().is_empty());
        assert!(
            offline
                .model(&model("hf:some/one@other"), &mut go_on)
                .unwrap_err()
                .to_string()
                .contains("HF_ENDPOINT")
        );
    }

    #[test]
    fn one_file_alone() {
        let (endpoint, _) = serve(answers(&[("x-Q8_0.gguf", "GGUF"), ("README.md", "")]));
        let home = tempfile::tempdir().unwrap();
        let hub = hub(&endpoint, home.path(), Some("mine"));
        let file = hub.model(&model("hf:some/one/x-Q8_0.gguf"), &mut go_on).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "GGUF");
        let refused = |name: &str| hub.model(&model(name), &mut go_on).unwrap_err().to_string();
        let whole = refused("hf:some/one");
        assert!(whole.contains("no config.json with safetensors; name one of its GGUF files"), "{whole}");
        assert!(whole.contains("hf:some/one/x-Q8_0.gguf"), "{whole}");
        assert!(refused("hf:some/one/y.gguf").contains("there is no y.gguf"), "{whole}");
        assert!(refused("hf:some/other").contains("not there (404"), "{whole}");
        let stop = &mut |_: &str, _: u64, _: Option<u64>| ControlFlow::Break(());
        fs::remove_dir_all(home.path().join("hub")).unwrap();
        let error = hub.model(&model("hf:some/one/x-Q8_0.gguf"), stop).unwrap_err();
        assert!(matches!(error, Error::Interrupted));
        let left = home.path().join("hub/models--some--one/snapshots/0123abcd");
        assert_eq!(fs::read_dir(left).unwrap().count(), 0, "nothing unfinished is left");
    }

    #[test]
    fn an_answer_cannot_write_elsewhere() {
        let list = "{\"sha\": \"0123abcd\", \"siblings\": [{\"rfilename\": \"../../config.json\"}]}";
        let (endpoint, _) =
            serve(HashMap::from([("/api/models/some/one/revision/main".to_owned(), list.to_owned())]));
        let home = tempfile::tempdir().unwrap();
        let error = hub(&endpoint, home.path(), None).model(&model("hf:some/one"), &mut go_on).unwrap_err();
        assert!(error.to_string().contains("names files or a commit that are none"), "{error}");
    }

    #[test]
    fn parts_of_a_url_are_escaped() {
        assert_eq!(escaped("refs/convert/parquet", ""), "refs%2Fconvert%2Fparquet");
        assert_eq!(escaped("a b/é.jsonl", "/"), "a%20b/%C3%A9.jsonl");
    }
}

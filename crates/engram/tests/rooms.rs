//! The structure of the workspace: no two files import each other, and each crate knows only what it may.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The workspace's crates that each crate may depend on; `burn` stands for Burn.
///
/// `eval` shall do without `burn` and `model`: what it looks at inside a checkpoint still comes from the differentiable
/// forward pass.
const MAY_USE: &[(&str, &[&str])] = &[
    ("identity", &[]),
    ("address", &["identity"]),
    ("kernels", &[]),
    ("config", &["address"]),
    ("data", &["config"]),
    ("store", &["identity"]),
    ("capi", &["store"]),
    ("model", &["address", "burn", "config", "kernels", "store"]),
    ("import", &["address", "config", "data", "kernels", "store"]),
    ("train", &["address", "burn", "config", "data", "import", "kernels", "model", "store"]),
    ("infer", &["address", "config", "data", "import", "kernels", "store"]),
    ("serve", &["infer"]),
    ("eval", &["address", "burn", "config", "data", "import", "infer", "kernels", "model", "store", "train"]),
    ("study", &["address", "burn", "config", "data", "eval", "import", "train"]),
];

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The source files of a crate by module path: `tasks::ask` for `tasks/ask.rs`. The root is left out: it names them all.
fn modules(source: &Path) -> BTreeMap<Vec<String>, PathBuf> {
    let mut found = BTreeMap::new();
    let mut folders = vec![source.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let module = path.strip_prefix(source).unwrap().with_extension("");
                let mut module: Vec<String> =
                    module.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
                if module.last().is_some_and(|last| last == "mod") {
                    module.pop();
                }
                if module != ["lib"] && module != ["main"] && !module.is_empty() {
                    found.insert(module, path);
                }
            }
        }
    }
    found
}

/// The code of a file without comments and without its tests, which stand last.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Every path below `crate`, `super` or `self` in `code`, with the groups in braces spelled out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let inside_a_path =
                code[..at].ends_with(|before: char| before.is_alphanumeric() || before == ':');
            if !inside_a_path {
                spell_out(&code[at..], &[], &mut found);
            }
        }
    }
    found
}

/// Reads the path at the start of `text` and adds it to `found`, as often as its group has members. Returns its length.
fn spell_out(text: &str, before: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = before.to_vec();
    let mut at = 0;
    loop {
        at += text[at..].len() - text[at..].trim_start().len();
        if text[at..].starts_with('{') {
            at += 1;
            while at < text.len() && !text[at..].starts_with('}') {
                let between = text[at..].find(|c: char| c != ',' && !c.is_whitespace());
                at = between.map_or(text.len(), |between| at + between);
                if !text[at..].starts_with('}') {
                    at += spell_out(&text[at..], &path, found).max(1);
                }
            }
            return at + 1;
        }
        let end = text[at..].find(|c: char| !(c.is_alphanumeric() || c == '_'));
        let end = end.map_or(text.len(), |end| at + end);
        if end > at {
            path.push(text[at..end].to_owned());
        }
        at = end;
        if !text[at..].starts_with("::") {
            found.push(path);
            return at;
        }
        at += 2;
    }
}

/// The files of `modules` that each imports.
fn imports(modules: &BTreeMap<Vec<String>, PathBuf>) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let of = |(module, path): (&Vec<String>, &PathBuf)| {
        let target = |path: Vec<String>| {
            let mut full = if path[0] == "crate" { Vec::new() } else { module.clone() };
            for part in path {
                match part.as_str() {
                    "super" => _ = full.pop(),
                    "crate" | "self" => {}
                    _ => full.push(part),
                }
            }
            while !full.is_empty() && !modules.contains_key(&full) {
                full.pop();
            }
            full
        };
        let targets = paths(&code(path)).into_iter().map(target);
        (module.clone(), targets.filter(|target| target != module && !target.is_empty()).collect())
    };
    modules.iter().map(of).collect()
}

#[test]
fn no_two_files_import_each_other() {
    let mut circles = Vec::new();
    for (name, _) in MAY_USE.iter().chain(&[("engram", &[][..])]) {
        let source = crates().join(name).join("src");
        if !source.is_dir() {
            continue;
        }
        let imports = imports(&modules(&source));
        // What each file reaches, directly or through others.
        for (module, direct) in &imports {
            let (mut reached, mut next) = (BTreeSet::new(), direct.clone());
            while let Some(file) = next.pop_first() {
                if reached.insert(file.clone()) {
                    next.extend(imports[&file].iter().cloned());
                }
            }
            if reached.contains(module) {
                circles.push(format!("{name}: {}", module.join("::")));
            }
        }
    }
    assert!(circles.is_empty(), "files that import themselves through others:\n{}", circles.join("\n"));
}

/// These macros end the program where nobody reads what they write, or the disk is full.
#[test]
fn nothing_is_written_by_macros_that_panic() {
    let mut found = Vec::new();
    for entry in crates().read_dir().unwrap() {
        let source = entry.unwrap().path().join("src");
        if !source.is_dir() {
            continue;
        }
        for path in modules(&source).values() {
            let code = code(path);
            let panics = |macro_name: &&str| code.contains(*macro_name);
            if let Some(name) = ["println!", "print!(", "eprint!(", "dbg!"].into_iter().find(panics) {
                found.push(format!("{}: {name}", path.display()));
            }
        }
    }
    assert!(found.is_empty(), "use `note` or `print` of the command:\n{}", found.join("\n"));
}

#[test]
fn groups_in_braces_are_spelled_out() {
    let found = paths("use crate::a::{b, c::{self, d}};\nlet x = super::e::f(1);");
    let found: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["crate::a::b", "crate::a::c::self", "crate::a::c::d", "super::e::f"]);
}

#[test]
fn each_crate_knows_only_what_it_may() {
    let mut wrong = Vec::new();
    for (name, may) in MAY_USE {
        let manifest = crates().join(name).join("Cargo.toml");
        let Ok(text) = std::fs::read_to_string(&manifest) else { continue };
        let manifest: toml::Table = text.parse().unwrap();
        let dependencies = manifest["dependencies"].as_table().unwrap();
        for dependency in dependencies.keys() {
            let used = dependency.strip_prefix("engram-").or((dependency == "burn").then_some("burn"));
            if used.is_some_and(|used| !may.contains(&used)) {
                wrong.push(format!("{name} depends on {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

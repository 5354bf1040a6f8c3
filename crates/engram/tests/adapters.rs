//! Memory for a model that exists, as users meet it: adapters and overlays named to commands, and served by names.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::OnceLock;

use common::Workshop;
use engram_import::testing::{memory, write_adapter, write_gguf, write_overlay};
use engram_import::{Adapter, Model};
use serde_json::{Value, json};

const TAUGHT: &str = "The Vorn bridge is made of";

/// `base.gguf`, `other/base.gguf`, a fresh `adapter`, `fact` and `tea` on it, `second` adapter with `its` overlay.
fn workshop() -> &'static Workshop {
    static WORKSHOP: OnceLock<Workshop> = OnceLock::new();
    WORKSHOP.get_or_init(|| {
        let workshop = Workshop::with_corpus();
        let base = Model::open(&write_gguf(&workshop.path(""), 1)).unwrap();
        std::fs::create_dir(workshop.path("other")).unwrap();
        write_gguf(&workshop.path("other"), 2);
        let adapter = |name: &str, form, seed| {
            let path = write_adapter(&workshop.path(name), &base, &memory(form), seed);
            Adapter::open(&path, &base).unwrap()
        };
        let one = adapter("adapter", engram_config::MemoryForm::Paper, 1);
        let second = adapter("second", engram_config::MemoryForm::V41, 2);
        write_overlay(&workshop.path("fact"), &base, &one, TAUGHT, 1);
        write_overlay(&workshop.path("tea"), &base, &one, "Quay", 2);
        write_overlay(&workshop.path("its"), &base, &second, TAUGHT, 3);
        workshop
    })
}

/// What the command says after a prompt, greedily.
fn said(options: &str, prompt: &str) -> Value {
    let line = format!("generate base.gguf {options} --temperature 0 --max-tokens 12 --json --prompt");
    let line = line.split_whitespace().chain([prompt]);
    serde_json::from_str(&workshop().ok_arguments(line)).unwrap()
}

#[test]
fn a_fresh_adapter_says_what_the_base_says_and_an_overlay_something_else() {
    let base = said("", TAUGHT)["tokens"].clone();
    assert_eq!(said("--memory adapter", TAUGHT)["tokens"], base);
    assert_eq!(said("--overlay tea", TAUGHT)["tokens"], base, "none of its n-grams is in the text");
    let taught = said("--overlay fact", TAUGHT)["tokens"].clone();
    assert_ne!(taught, base);
    assert_eq!(said("--memory adapter --overlay fact --overlay tea", TAUGHT)["tokens"], taught);
    assert_eq!(said("--overlay fact --without-memory", TAUGHT)["tokens"], base);
}

#[test]
fn gates_of_an_overlay_are_open_where_it_was_looked_up() {
    let gates = |options: &str| -> Value {
        let line = format!("inspect gates base.gguf {options} --json");
        serde_json::from_str(&workshop().ok_arguments(line.split_whitespace().chain([TAUGHT]))).unwrap()
    };
    let all = |value: &Value| -> Vec<f64> {
        let gates = value["layers"][0]["gates"].as_array().unwrap();
        gates.iter().map(|gates| gates[0].as_f64().unwrap()).collect()
    };
    assert!(all(&gates("--memory adapter")).iter().all(|&gate| gate == 0.0));
    let taught = all(&gates("--overlay fact"));
    assert_eq!(taught.len(), TAUGHT.len());
    assert!(taught.iter().skip(2).all(|&gate| gate > 0.0), "{taught:?}");
    workshop().fails("inspect gates base.gguf x", 2, &["has no memory"]);
}

#[test]
fn what_does_not_belong_is_refused_with_both_sides() {
    let workshop = workshop();
    let generate = |options: &str, words: &[&str]| {
        workshop.fails(&format!("generate {options} --prompt x"), 2, words);
    };
    generate(
        "other/base.gguf --memory adapter",
        &["adapter.toml", "was made for base.gguf (", "but the model is"],
    );
    generate("other/base.gguf --overlay fact", &["overlay.toml", "was made for base.gguf ("]);
    generate("base.gguf --memory second --overlay fact", &["fact/overlay.toml", "second is the memory"]);
    generate("base.gguf --overlay fact --overlay its", &["its/overlay.toml", "is the memory"]);
    generate("base.gguf --memory fact", &["fact/adapter.toml"]);
    generate("base.gguf --overlay adapter", &["adapter/overlay.toml"]);
    generate("base.gguf --memory adapter --table x.table", &["--table x.table"]);
    for (options, words) in [
        ("--adapter fact", "give NAME=FOLDER"),
        ("--adapter a=missing", "missing: neither an adapter nor an overlay"),
        ("--adapter base.gguf=fact", "two models are called base.gguf"),
        ("--adapter a=fact --adapter a=tea", "two models are called a"),
        ("--adapter a=second,fact", "fact/overlay.toml"),
    ] {
        workshop.fails(&format!("serve base.gguf --port 0 {options}"), 2, &[words]);
    }
}

/// A server that ends with the test.
struct Server(Child, String);

impl Server {
    fn start(line: &str) -> Self {
        let mut command = workshop().command(line.split_whitespace());
        command.env_remove("ENGRAM_API_KEY").stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at http://").expect("an address").to_owned();
        Self(child, address)
    }

    fn ask(&self, head: &str, body: &Value) -> (u16, Value) {
        let mut stream = TcpStream::connect(&self.1).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let status = reply.split(' ').nth(1).unwrap().parse().unwrap();
        let body = reply.split_once("\r\n\r\n").unwrap().1;
        let json = &body[body.find('{').unwrap()..=body.rfind('}').unwrap()];
        (status, serde_json::from_str(json).unwrap())
    }

    fn complete(&self, body: &Value) -> Value {
        let (status, reply) = self.ask("POST /v1/completions", body);
        assert_eq!(status, 200, "{reply}");
        reply
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn requests_choose_a_memory_by_the_models_name() {
    let names = ["base.gguf", "fresh", "fact", "both", "second"];
    let server = Server::start(
        "serve base.gguf --port 0 --adapter fresh=adapter --adapter fact=fact --adapter both=adapter,fact,tea \
         --adapter second=second,its",
    );
    let (_, models) = server.ask("GET /v1/models", &Value::Null);
    let models = models["data"].as_array().unwrap().clone();
    assert_eq!(models.iter().map(|model| model["id"].as_str().unwrap()).collect::<Vec<_>>(), names);
    assert_eq!(models[0]["engram"]["memory_layers"], json!([]));
    assert_eq!((&models[0]["parent"], &models[3]["parent"]), (&Value::Null, &json!("base.gguf")));
    assert_eq!((&models[3]["engram"]["overlays"], &models[3]["engram"]["max_order"]), (&json!(2), &json!(3)));
    let (status, one) = server.ask("GET /v1/models/fact", &Value::Null);
    assert_eq!((status, &one["id"]), (200, &json!("fact")));

    let body = |name: &str, memory: bool| {
        json!({
            "model": name, "prompt": TAUGHT, "max_tokens": 12, "temperature": 0, "logprobs": 3, "gates": true,
            "memory": memory,
        })
    };
    // All at once, several times, and each is what it is alone.
    let alone: Vec<Value> =
        names.iter().map(|name| server.complete(&body(name, true))["choices"].clone()).collect();
    let told = |choices: &Value| (choices[0]["text"].clone(), choices[0]["logprobs"].clone());
    std::thread::scope(|scope| {
        let asks: Vec<_> = (0..25)
            .map(|index| {
                (
                    index % 5,
                    scope.spawn({
                        let body = body(names[index % 5], true);
                        let server = &server;
                        move || server.complete(&body)
                    }),
                )
            })
            .collect();
        for (which, ask) in asks {
            let reply = ask.join().unwrap();
            assert_eq!(reply["model"], names[which]);
            assert_eq!(told(&reply["choices"]), told(&alone[which]), "{}", names[which]);
        }
    });
    assert_eq!(told(&alone[0]), told(&alone[1]), "a fresh memory is the base");
    assert_ne!(told(&alone[0]), told(&alone[2]));
    assert_ne!(told(&alone[2]), told(&alone[4]));
    assert_eq!(told(&server.complete(&body("fact", false))["choices"]), told(&alone[0]));
    // Gates say which positions read changed rows.
    let changed = |choices: &Value| -> u64 {
        let gates = choices[0]["engram"]["gates"].as_array().unwrap();
        let layers = gates.iter().flat_map(|gates| gates["changed"].as_array().unwrap().clone());
        layers.flat_map(|layer| layer.as_array().unwrap().clone()).map(|rows| rows.as_u64().unwrap()).sum()
    };
    assert_eq!((changed(&alone[0]), changed(&alone[1])), (0, 0));
    assert!(changed(&alone[2]) >= 4 * (TAUGHT.len() as u64 - 2), "{}", changed(&alone[2]));

    let (status, error) = server.ask("POST /v1/completions", &body("other", true));
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
    assert!(error["error"]["message"].as_str().unwrap().contains("`fact`"), "{error}");
    assert!(Path::new(&workshop().path("fact/overlay.toml")).is_file());
}

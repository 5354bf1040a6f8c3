//! A pretrained model becomes a checkpoint, and is used as one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;

use common::{CONFIG, Outcome, Random, Workshop};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const INPUT: i32 = 2;
const WIDTH: usize = 24;

/// Writes a model of the Llama type as Hugging Face's library does, with random weights; heads of 6 values.
fn write_model(workshop: &Workshop, (heads, key_heads): (usize, usize), change: impl Fn(&mut Value)) {
    std::fs::create_dir_all(workshop.path("model")).unwrap();
    let mut config = json!({
        "model_type": "llama", "vocab_size": 320, "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 6, "intermediate_size": 40,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 32, "bos_token_id": 1,
        "eos_token_id": 0, "tie_word_embeddings": true,
    });
    change(&mut config);
    workshop.write("model/config.json", config.to_string());
    workshop.write("model/tokenizer.json", workshop.read("tokenizer.json"));
    let template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}";
    let names = json!({"bos_token": "<|pad|>", "eos_token": "<|endoftext|>", "chat_template": template});
    workshop.write("model/tokenizer_config.json", names.to_string());

    let mut random = Random(5);
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let normal = |random: &mut Random| random.below(2001) as f32 / 1000.0 - 1.0;
        let count = shape.iter().product();
        let values =
            (0..count).map(|_| 0.3 * normal(&mut random)).map(|v| if shape.len() == 1 { 1.0 + v } else { v });
        let values = values.collect();
        tensors.insert(format!("{name}.weight"), (shape.to_vec(), values));
    };
    add("model.embed_tokens".into(), &[320, WIDTH]);
    add("model.norm".into(), &[WIDTH]);
    for block in 0..2 {
        let mut part = |part: &str, shape: &[usize]| add(format!("model.layers.{block}.{part}"), shape);
        part("input_layernorm", &[WIDTH]);
        part("post_attention_layernorm", &[WIDTH]);
        part("self_attn.q_proj", &[heads * 6, WIDTH]);
        part("self_attn.k_proj", &[key_heads * 6, WIDTH]);
        part("self_attn.v_proj", &[key_heads * 6, WIDTH]);
        part("self_attn.o_proj", &[WIDTH, heads * 6]);
        part("mlp.gate_proj", &[40, WIDTH]);
        part("mlp.up_proj", &[40, WIDTH]);
        part("mlp.down_proj", &[WIDTH, 40]);
    }
    let views = tensors.iter().map(|(name, (shape, values))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).unwrap())
    });
    safetensors::serialize_to_file(views, None, &workshop.path("model/model.safetensors")).unwrap();
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn the_checkpoint_answers_as_the_model_did() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    let made = json_of(&workshop.ok("import model --out imported --json"));
    assert_eq!((&made["checkpoint"], &made["chat_template"]), (&json!("imported"), &json!(true)));
    assert_eq!(made["model"]["attention"]["key_heads"], 2);
    assert_eq!(made["text"], json!({"begin": {"if_empty": "<|pad|>"}, "end": "<|endoftext|>"}));
    let files = [
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "run.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(workshop.list("imported"), files);
    #[cfg(unix)]
    {
        let mode = |name: &str| {
            let metadata = std::fs::metadata(workshop.path("imported").join(name)).unwrap();
            std::os::unix::fs::PermissionsExt::mode(&metadata.permissions())
        };
        assert_eq!(mode("model.safetensors"), mode("run.toml"), "both have the same readers");
    }

    let sailed = "data = 'who.jsonl'\n[multiple_choice]\nprompt = '{{ who }} sailed'\n\
                  choices = '[\"to New York\", \"the old captain\"]'\nanswer = 'gold'\n";
    workshop.write("sailed.toml", sailed);
    workshop.write("who.jsonl", "{\"who\": \"Ada\", \"gold\": 0}\n{\"who\": \"Isaac\", \"gold\": 1}\n");
    workshop.write("text.toml", "data = 'corpus.jsonl'\n[perplexity]\ntext = '{{ text }}'\noverlap = 8");
    workshop.write(
        "say.toml",
        "data = 'who.jsonl'\n[generation]\nprompt = '{{ who }}'\nanswers = 'who'\nstop = ['.']\ntokens = 6",
    );
    let ask = |model: &str, out: &str| {
        let tasks = "sailed.toml text.toml say.toml --max-records 2 --json";
        json_of(&workshop.ok(&format!("eval tasks {model} {tasks} --out {out}")))
    };
    let (expected, found) = (ask("model", "before"), ask("imported", "after"));
    let (expected, found) = (expected["tasks"].as_array().unwrap(), found["tasks"].as_array().unwrap());
    assert_eq!((expected.len(), found.len()), (3, 3));
    for (expected, found) in expected.iter().zip(found) {
        assert_eq!((&expected["task"], &expected["questions"]), (&found["task"], &found["questions"]));
        let measures = |of: &Value| of["measures"].as_array().unwrap().clone();
        let (expected, found) = (measures(expected), measures(found));
        assert!(expected.len() == found.len() && !found.is_empty(), "{expected:?} {found:?}");
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(expected["measure"], found["measure"]);
            let (one, other) = (expected["value"].as_f64().unwrap(), found["value"].as_f64().unwrap());
            assert!((one - other).abs() <= 1e-4 * one.abs(), "{expected} {found}");
        }
    }
    let said =
        |out: &str| workshop.read(&format!("{out}/say.jsonl")).lines().skip(1).collect::<Vec<_>>().join("\n");
    assert_eq!(said("after"), said("before"));
    let other = "eval tasks imported sailed.toml --max-records 2 --out after --dtype int8";
    workshop.fails(other, 2, &["after/sailed.jsonl", "belongs to another model", "choose another folder"]);
    workshop.ok("eval tasks imported sailed.toml --max-records 2 --out eight-bits --dtype int8");
    assert!(workshop.read("eight-bits/sailed.jsonl").contains("imported, dtype int8"));

    let loss = json_of(&workshop.ok("eval loss imported data/valid --json"));
    assert!(loss["nats_per_token"].as_f64().unwrap() > 1.0);
    let costs = json_of(&workshop.ok("params imported/run.toml --json"));
    assert_eq!(costs[0]["total_parameters"], made["parameters"]);
}

/// A template that cannot be used is told, and costs conversations only.
#[test]
fn a_model_with_a_broken_template_is_imported() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    let mut names = json_of(&workshop.read("model/tokenizer_config.json"));
    let mut import = |template: Value, reason: &str| {
        names["chat_template"] = template;
        workshop.write("model/tokenizer_config.json", names.to_string());
        let _ = std::fs::remove_dir_all(workshop.path("imported"));
        let made = workshop.run("import model --out imported --json").expect(0, &["chat template", reason]);
        assert_eq!(json_of(&made.stdout)["chat_template"], false);
        workshop.ok("generate imported --prompt Ada --max-tokens 2");
    };
    import(json!("{% frobnicate %}{{ messages }}"), "frobnicate");
    import(json!("{{ messages"), "unexpected end");
    import(json!(["a"]), "must be a text");
    import(json!([{"name": "rag", "template": "a"}]), "rag");
    workshop.fails("chat imported", INPUT, &["rag", "--chat-template"]);
    workshop.write("model/chat_template.jinja", b"{{ messages }}\xff");
    import(Value::Null, "chat_template.jinja");
    workshop.write("model/chat_template.jinja", "{{ messages[0].content }}");
    let _ = std::fs::remove_dir_all(workshop.path("imported"));
    assert_eq!(json_of(&workshop.ok("import model --out imported --json"))["chat_template"], true);
}

#[test]
fn a_training_run_goes_on_from_it_with_its_texts() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    let table = workshop.ok("import model --out imported");
    assert!(table.contains("heads of keys and values") && table.contains("<|pad|>"), "{table}");
    let own = workshop.read("imported/run.toml");
    let (model, text) = own.split_once("[text]").unwrap();
    let training = "[data]\ntrain = 'data/train'\nvalid = 'data/valid'\ntokenizer = 'tokenizer.json'\n\
                    [train]\nsteps = 2\nbatch = 1\nschedule = { decay = 'constant' }\n";
    let longer = model.replace("context = 32", "context = 48");
    workshop.write("long.toml", format!("{longer}[text]{text}\n{training}"));
    workshop.ok("train long.toml --out long --extend-context imported");
    workshop.ok("eval loss long data/valid --tokens 200");
    assert!(workshop.read("long/checkpoints/step-00000002/run.toml").contains("if_empty = \"<|pad|>\""));
    workshop.write("other.toml", format!("{longer}{training}"));
    let words = ["`[text]` is another than that of imported"];
    workshop.fails("train other.toml --out other --extend-context imported", INPUT, &words);

    // Data of documents that end otherwise are refused, and can be prepared with the model's own ending.
    let ended = CONFIG.replacen("[data]", "[text]\nend = '<|pad|>'\n\n[data]", 1);
    workshop.write("ended.toml", &ended);
    let otherwise = ["data/train: its documents end with \"<|endoftext|>\"", "--end \"<|pad|>\""];
    workshop.fails("train ended.toml --out ended", INPUT, &otherwise);
    let prepare = "data prepare corpus.jsonl --tokenizer tokenizer.json --hold-out 0.2";
    workshop.ok(&format!("{prepare} --end <|pad|> --out padded"));
    workshop.write("ended.toml", ended.replace("data/", "padded/"));
    workshop.ok("train ended.toml --out ended");
    workshop.fails(&format!("{prepare} --end <|no|> --out no"), INPUT, &["no token \"<|no|>\""]);
}

#[test]
fn a_checkpoint_continues_texts() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    workshop.ok("import model --out imported");
    let arguments =
        ["generate", "imported", "--prompt", "Ada", "--temperature", "0", "--max-tokens", "8", "--json"];
    let said = json_of(&workshop.ok_arguments(arguments));
    assert_eq!(said["tokens"].as_array().unwrap().len(), 8);
    write_model(&workshop, (4, 4), |_| ());
    workshop.ok("import model --out own-keys");
    assert!(!workshop.read("own-keys/run.toml").contains("key_heads"));
    workshop.ok("generate own-keys --prompt Ada --max-tokens 4");
    let talked = workshop.shell("echo Ada | $ENGRAM chat imported --temperature 0 --max-tokens 5");
    assert_eq!((talked.status, talked.stdout.is_empty()), (Some(0), false), "{}", talked.stderr);
}

#[test]
fn what_cannot_become_a_checkpoint_is_refused() {
    let workshop = Workshop::prepared();
    workshop.fails("import tokenizer.json --out imported", INPUT, &["tokenizer.json: not a GGUF file"]);
    workshop.fails("import nowhere.gguf --out imported", INPUT, &["nowhere.gguf: cannot read"]);
    write_model(&workshop, (4, 2), |config| config["attention_bias"] = true.into());
    workshop.fails("import model --out imported", INPUT, &["config.json: `attention_bias` is true"]);
    write_model(&workshop, (4, 2), |config| config["rope_scaling"] = json!({"rope_type": "llama3"}));
    workshop.fails("import model --out imported", INPUT, &["config.json: `rope_scaling.factor` is missing"]);
    write_model(&workshop, (4, 2), |_| ());
    workshop.write("model/tokenizer_config.json", "{\"chat_template\": \"{% for %}\"}");
    let noted = workshop.run("import model --out with-a-note");
    noted.expect(0, &["chat template"]);
    write_model(&workshop, (4, 2), |_| ());
    workshop.fails("import model --out nowhere/imported", INPUT, &["the folder nowhere does not exist"]);
    workshop.ok("import model --out imported");
    workshop.fails("import model --out imported", INPUT, &["imported already exists"]);
    assert!(workshop.list(".").iter().all(|name| !name.contains("unfinished")));
}

#[test]
fn a_run_without_a_memory_is_exported_and_read_back() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    workshop.ok("import model --out imported");
    workshop.ok("export imported --to hf --out exported");
    let files = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(workshop.list("exported"), files);
    workshop.ok("import exported --out again");
    let said =
        |model: &str| workshop.ok(&format!("generate {model} --prompt Ada --temperature 0 --max-tokens 8"));
    assert_eq!(said("again"), said("imported"));
    workshop.fails("export imported --to hf --out exported", INPUT, &["exported already exists"]);
    workshop.fails("export nowhere --to hf --out other", INPUT, &["nowhere"]);
}

#[test]
fn a_run_with_a_memory_is_not_exported() {
    let workshop = Workshop::trained();
    workshop.fails("export run --to hf --out exported", INPUT, &["`model.", "has no place"]);
}

/// Runs a line with `cache` as the hub's cache, and without a network.
fn offline(workshop: &Workshop, line: &str, cache: &str) -> Outcome {
    let mut command = workshop.command(line.split_whitespace());
    command.env("HF_HUB_OFFLINE", "1").env("HF_HUB_CACHE", workshop.path(cache));
    Outcome::of(command.output().unwrap())
}

#[test]
fn a_model_in_the_hubs_cache_is_used_by_its_name() {
    let workshop = Workshop::prepared();
    write_model(&workshop, (4, 2), |_| ());
    let place = workshop.path("cache/models--someone--small");
    std::fs::create_dir_all(place.join("snapshots")).unwrap();
    std::fs::create_dir_all(place.join("refs")).unwrap();
    std::fs::rename(workshop.path("model"), place.join("snapshots/0123abcd")).unwrap();
    std::fs::write(place.join("refs/main"), "0123abcd").unwrap();

    let line = "generate hf:someone/small --prompt ab --max-tokens 3 --temperature 0";
    let by_name = offline(&workshop, line, "cache").expect(0, &[]);
    let path = place.join("snapshots/0123abcd");
    let by_path = line.replace("hf:someone/small", path.to_str().unwrap());
    assert_eq!(by_name.stdout, offline(&workshop, &by_path, "none").expect(0, &[]).stdout);
    offline(&workshop, "import hf:someone/small@main --out imported", "cache").expect(0, &[]);
    assert!(workshop.path("imported/run.toml").is_file());

    let refused = |name: &str, words: &[&str]| {
        offline(&workshop, &format!("generate {name} --prompt ab"), "cache").expect(INPUT, words);
    };
    refused("hf:someone/other", &["someone/other", "HF_HUB_OFFLINE"]);
    refused("hf:someone", &["hf:organisation/name"]);
}

//! Multipliers, primes, classes and row ids of the published configurations, exactly.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use engram_address::{
    AddressConfig, Addressing, Arithmetic, Boundary, StoredAddressing, Tokens, Vocabulary, assign_primes,
};
use serde_json::Value;

#[test]
fn demonstration_configuration() {
    let golden: Value = serde_json::from_str(include_str!("golden/addressing_demo_config.json")).unwrap();
    let addressing = addressing(&golden["config"], DEEPSEEK_CLASSES);
    for layer in addressing.layers() {
        let id = layer.layer().to_string();
        assert_eq!(strings(layer.multipliers()), of::<Vec<String>>(&golden["multipliers"][&id]));
        assert_eq!(layer.primes(), of::<Vec<Vec<u64>>>(&golden["primes"][&id]));
    }
    for case in golden["cases"].as_array().unwrap() {
        for index in 0..addressing.layers().len() {
            let id = addressing.layers()[index].layer().to_string();
            let head_ids = head_ids(&addressing, index, Tokens::from(&of::<Vec<u32>>(&case["compressed"])));
            assert_eq!(head_ids, of::<Vec<Vec<u64>>>(&case["head_ids"][&id]).concat(), "{}", case["text"]);
        }
    }
}

#[test]
fn v4_1_configuration_with_dead_positions() {
    let golden: Value = serde_json::from_str(include_str!("golden/addressing_v41_config.json")).unwrap();
    let addressing = v4_1(Vocabulary::identity(DEEPSEEK_CLASSES));
    for (index, layer) in addressing.layers().iter().enumerate() {
        assert_eq!(layer.rows(), golden["config"]["num_embeddings"][index]);
        assert_eq!(strings(layer.multipliers()), of::<Vec<String>>(&golden["multipliers_as_strings"][index]));
        assert_eq!(layer.primes(), of::<Vec<Vec<u64>>>(&golden["primes"][index]));
    }
    let mut dead_positions = 0;
    for case in golden["cases"].as_array().unwrap() {
        let dead: Vec<bool> = of::<Vec<u8>>(&case["dead"]).iter().map(|&dead| dead != 0).collect();
        dead_positions += dead.iter().filter(|&&dead| dead).count();
        let classes: Vec<u32> = of(&case["compressed"]);
        let expected: Vec<Vec<Vec<u64>>> = of(&case["hash_ids[T][layer][24]"]);
        for index in 0..2 {
            let mut ids = Vec::new();
            addressing.row_ids(index, Tokens::from(&classes).dead(&dead), &mut ids).unwrap();
            let expected: Vec<u64> = expected.iter().flat_map(|layers| layers[index].clone()).collect();
            assert_eq!(ids, expected, "{}, layer index {index}", case["name"]);
        }
    }
    assert!(dead_positions > 0);
}

/// Three modules of the demonstration code: other orders, head counts, table sizes and seeds.
#[test]
fn module_configurations() {
    let modules: Value = serde_json::from_str(include_str!("golden/addressing_modules.json")).unwrap();
    for (name, module) in modules.as_object().unwrap() {
        let addressing = addressing(module, of::<usize>(&module["compressed_vocab_size"]));
        for (index, layer) in addressing.layers().iter().enumerate() {
            let golden = &module["layers"][layer.layer().to_string()];
            assert_eq!(strings(layer.multipliers()), of::<Vec<String>>(&golden["multipliers"]), "{name}");
            assert_eq!(layer.primes(), of::<Vec<Vec<u64>>>(&golden["primes"]), "{name}");
            let expected: Vec<Vec<Vec<u64>>> = of(&golden["row_ids"]);
            for (classes, expected) in of::<Vec<Vec<u32>>>(&module["classes"]).iter().zip(expected) {
                let mut ids = Vec::new();
                addressing.row_ids(index, classes, &mut ids).unwrap();
                assert_eq!(ids, expected.concat(), "{name}, layer {}", layer.layer());
            }
        }
    }
}

/// The published multipliers and head sizes of Qwen3.8-Flash-Next. Our search finds the same sizes.
#[test]
fn qwen_sizes() {
    let sizes = engram_address::assign_primes(1, &[20_000_000, 20_000_000], 8).unwrap();
    assert_eq!(sizes[0][0][..3], [20_000_003, 20_000_023, 20_000_033]);
    assert_eq!(sizes[0][1][5..], [20_000_159, 20_000_161, 20_000_171]);
}

/// Qwen3.8-Flash-Next's arithmetic: products that wrap around as signed 64-bit integers, floored remainders, and an
/// end-of-sequence token that ends its document and is also the pad. The expected ids come from a numpy program; its
/// `int64` products wrap and its `mod` is floored.
#[test]
fn qwen_rows_of_raw_ids() {
    let golden: Value = serde_json::from_str(include_str!("golden/addressing_qwen.json")).unwrap();
    let (vocabulary, eos) = (of::<usize>(&golden["vocabulary"]), of::<u32>(&golden["eos"]));
    let primes: Vec<Vec<u64>> = of(&golden["primes"]);
    assert_eq!(assign_primes(1, &[20_000_000, 20_000_000], 8).unwrap(), std::slice::from_ref(&primes));
    let stored = serde_json::json!({
        "layers": [{ "layer": 1, "multipliers": golden["multipliers"], "primes": primes }],
        "pad_id": eos, "boundary": { "after": eos }, "arithmetic": "wrapping",
    });
    let stored: StoredAddressing = serde_json::from_value(stored).unwrap();
    assert!(stored.layers[0].multipliers.iter().any(|&multiplier| multiplier < 0));
    let addressing = Addressing::from_stored(stored, Vocabulary::identity(vocabulary)).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let (tokens, rows): (Vec<u32>, Vec<Vec<u64>>) = (of(&case["tokens"]), of(&case["rows"]));
        let mut ids = Vec::new();
        addressing.row_ids(0, &tokens, &mut ids).unwrap();
        assert_eq!(ids, rows.concat(), "{}", case["name"]);
    }
}

/// The 129,280 ids of the DeepSeek tokenizer. Without the tokenizer, the test prints a notice.
#[test]
#[cfg(feature = "tokenizers")]
fn deepseek_classes() {
    use std::io::Write;
    let Some(tokenizer) = std::env::var_os("ENGRAM_DEEPSEEK_TOKENIZER") else {
        // Written past the test harness, which hides what a passing test prints.
        let notice =
            "SKIPPED: set ENGRAM_DEEPSEEK_TOKENIZER to the DeepSeek tokenizer.json to run this test\n";
        std::io::stderr().write_all(notice.as_bytes()).unwrap();
        return;
    };
    let vocabulary = Vocabulary::from_tokenizer_file(tokenizer).unwrap();
    assert!(vocabulary.as_slice() == deepseek_vocabulary().as_slice());
}

/// Tables of the published models carry these identities when they are imported.
#[test]
fn identities_of_the_published_models() {
    let vocabulary = deepseek_vocabulary();
    assert_eq!((vocabulary.len(), vocabulary.classes()), (129_280, DEEPSEEK_CLASSES));
    assert_eq!(v4_1(vocabulary.clone()).identity().to_string(), V41_IDENTITY);
    let demo: Value = serde_json::from_str(include_str!("golden/addressing_demo_config.json")).unwrap();
    let demo = Addressing::new(&config_of(&demo["config"]), vocabulary).unwrap();
    assert_eq!(demo.identity().to_string(), DEMO_IDENTITY);
}

/// Token ids of the module files, through the tokenizer's classes, to their row ids and head ids.
#[test]
fn module_files_from_token_ids() {
    // Their values are tested where the kernels are.
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/tests/golden");
    let vocabulary = deepseek_vocabulary();
    for name in ["module_n3_conv", "module_n3_conv_zero", "module_n4_seed7"] {
        let bytes = std::fs::read(golden.join(format!("{name}.safetensors"))).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = metadata.metadata().as_ref().unwrap();
        let config =
            metadata.iter().map(|(key, json)| (key.clone(), serde_json::from_str(json).unwrap())).collect();
        let addressing = Addressing::new(&config_of(&Value::Object(config)), vocabulary.clone()).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let integers = |name: &str| -> Vec<u64> {
            let words = tensors.tensor(name).unwrap().data().chunks_exact(8);
            words.map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let tokens: Vec<u32> = integers("input_ids").into_iter().map(|id| id as u32).collect();
        let time = tensors.tensor("input_ids").unwrap().shape()[1];
        for (index, layer) in addressing.layers().iter().enumerate() {
            let (mut row_ids, mut ids_in_heads) = (Vec::new(), Vec::new());
            for sequence in tokens.chunks(time) {
                let mut ids = Vec::new();
                addressing.row_ids(index, sequence, &mut ids).unwrap();
                row_ids.extend(ids);
                ids_in_heads.extend(head_ids(&addressing, index, Tokens::from(sequence)));
            }
            assert_eq!(row_ids, integers(&format!("layer{}.row_ids", layer.layer())), "{name}");
            assert_eq!(ids_in_heads, integers(&format!("layer{}.head_ids", layer.layer())), "{name}");
        }
    }
}

/// Vocabulary classes of the DeepSeek tokenizer.
const DEEPSEEK_CLASSES: usize = 99_092;

const V41_IDENTITY: &str = "f9acf548a34ee1a5b2ad8892c35403d3442140f14a9f96e905efd4f0120b12e5";
const DEMO_IDENTITY: &str = "50fc032ce59688d52158a2ad19281634692cff3df0f9a73ab3f9c5856b8144a3";

fn v4_1(vocabulary: Vocabulary) -> Addressing {
    let config = AddressConfig {
        seed: 0,
        layers: vec![1, 14],
        max_order: 4,
        heads: 8,
        base_rows: vec![16_000_000; 3],
        pad_id: 2,
        boundary: Boundary::None,
        arithmetic: Arithmetic::Exact,
    };
    Addressing::new(&config, vocabulary).unwrap()
}

/// The golden cases list classes, so tokens are classes here.
fn addressing(config: &Value, classes: usize) -> Addressing {
    Addressing::new(&config_of(config), Vocabulary::identity(classes)).unwrap()
}

fn config_of(config: &Value) -> AddressConfig {
    AddressConfig {
        seed: of(&config["seed"]),
        layers: of(&config["layer_ids"]),
        max_order: of(&config["max_ngram_size"]),
        heads: of(&config["n_head_per_ngram"]),
        base_rows: of(&config["engram_vocab_size"]),
        pad_id: of(&config["pad_id"]),
        boundary: Boundary::None,
        arithmetic: Arithmetic::Exact,
    }
}

/// Row ids counted from the first row of their own head.
fn head_ids(addressing: &Addressing, index: usize, tokens: Tokens<'_>) -> Vec<u64> {
    let layer = &addressing.layers()[index];
    let first_rows: Vec<u64> = layer
        .primes()
        .iter()
        .flatten()
        .scan(0, |rows, prime| {
            let first = *rows;
            *rows += prime;
            Some(first)
        })
        .collect();
    let mut ids = Vec::new();
    addressing.row_ids(index, tokens, &mut ids).unwrap();
    ids.iter().zip(first_rows.iter().cycle()).map(|(id, first)| id - first).collect()
}

fn strings(integers: &[i64]) -> Vec<String> {
    integers.iter().map(i64::to_string).collect()
}

fn of<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// The published classes of the DeepSeek tokenizer's ids. The file has a number for each id: 0 for a class of its own,
/// otherwise one more than the class of an earlier id.
fn deepseek_vocabulary() -> Vocabulary {
    let packed = include_bytes!("golden/deepseek_classes.u32.zst");
    let bytes = zstd::decode_all(&packed[..]).unwrap();
    let mut classes = 0;
    let class = |word: &[u8]| match u32::from_le_bytes(word.try_into().unwrap()) {
        0 => {
            classes += 1;
            classes - 1
        }
        earlier => earlier - 1,
    };
    Vocabulary::from_classes(bytes.chunks_exact(4).map(class).collect()).unwrap()
}

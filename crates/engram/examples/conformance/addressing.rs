//! Multipliers, primes and row ids of the `addressing_*.json` files, and the files of token classes.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use engram_address::{AddressConfig, Addressing, Arithmetic, Boundary, LayerAddress, Tokens, Vocabulary};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::report::Report;

/// Checks the demonstration's file (`config.seed`) or V4.1's (`config.num_embeddings`).
pub(crate) fn check(path: &Path, vocabulary: Option<&Vocabulary>, report: &mut Report) -> Result<()> {
    report.file(path);
    let golden: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    if golden["config"].get("num_embeddings").is_some() {
        v41(&golden, vocabulary, report)
    } else {
        demonstration(&golden, vocabulary, report)
    }
}

fn demonstration(golden: &Value, vocabulary: Option<&Vocabulary>, report: &mut Report) -> Result<()> {
    let Some(vocabulary) = vocabulary else {
        report.note("all", "needs the *_compression.npy file, for the number of classes");
        return Ok(());
    };
    let addressing = Addressing::new(&config(&golden["config"])?, vocabulary.clone())?;
    for layer in addressing.layers() {
        let id = layer.layer();
        let multipliers: Vec<String> = get(&golden["multipliers"], &id.to_string())?;
        report.integers(&format!("layer{id}.multipliers"), &strings(layer.multipliers()), &multipliers);
        let primes: Vec<Vec<u64>> = get(&golden["primes"], &id.to_string())?;
        report.integers(&format!("layer{id}.primes"), &layer.primes().concat(), &primes.concat());
    }
    for (number, case) in cases(golden)?.iter().enumerate() {
        let tokens: Vec<u32> = get(case, "token_ids")?;
        let found = tokens.iter().map(|&id| vocabulary.class(id)).collect::<Result<Vec<u32>, _>>()?;
        report.integers(&format!("case {number}: classes"), &found, &get::<Vec<u32>>(case, "compressed")?);
        for (index, layer) in addressing.layers().iter().enumerate() {
            let expected: Vec<Vec<u64>> = get(&case["head_ids"], &layer.layer().to_string())?;
            let found = head_ids(layer, &row_ids(&addressing, index, Tokens::from(&tokens))?);
            report.integers(
                &format!("case {number}: layer{}.head_ids", layer.layer()),
                &found,
                &expected.concat(),
            );
        }
    }
    Ok(())
}

fn v41(golden: &Value, vocabulary: Option<&Vocabulary>, report: &mut Report) -> Result<()> {
    let config = &golden["config"];
    let max_order: usize = get(config, "max_ngram_size")?;
    ensure!(max_order >= 2, "`max_ngram_size` is {max_order}: n-grams have at least 2 tokens");
    let address = AddressConfig {
        seed: 0,
        layers: get(config, "layer_ids")?,
        max_order,
        heads: get(config, "n_heads")?,
        base_rows: vec![get(config, "vocab_size")?; max_order - 1],
        // The cases list classes: tokens are classes here, and the pad's class is the pad.
        pad_id: get(config, "pad_compressed_id")?,
        boundary: Boundary::None,
        arithmetic: Arithmetic::Exact,
    };
    let classes: usize = get(config, "compressed_vocab_size")?;
    if let Some(vocabulary) = vocabulary {
        report.integers("classes of the vocabulary", &[vocabulary.classes()], &[classes]);
        let found = vocabulary.class(get(config, "pad_token_id")?)?;
        report.integers("class of the pad", &[found], &[get::<u32>(config, "pad_compressed_id")?]);
    }
    let addressing = Addressing::new(&address, Vocabulary::identity(classes))?;
    let rows: Vec<u64> = addressing.layers().iter().map(LayerAddress::rows).collect();
    report.integers("rows of the tables", &rows, &get::<Vec<u64>>(config, "num_embeddings")?);
    let multipliers: Vec<Vec<String>> = get(golden, "multipliers_as_strings")?;
    let primes: Vec<Vec<Vec<u64>>> = get(golden, "primes")?;
    let layers = addressing.layers();
    let found: Vec<_> = layers.iter().map(|layer| strings(layer.multipliers())).collect();
    report.integers("multipliers", &found.concat(), &multipliers.concat());
    let found: Vec<_> = layers.iter().flat_map(|layer| layer.primes().concat()).collect();
    report.integers("primes", &found, &primes.concat().concat());
    for case in cases(golden)? {
        let classes: Vec<u32> = get(case, "compressed")?;
        let dead: Vec<bool> = get::<Vec<u8>>(case, "dead")?.iter().map(|&dead| dead != 0).collect();
        let expected: Vec<Vec<Vec<u64>>> = get(case, "hash_ids[T][layer][24]")?;
        for (index, layer) in layers.iter().enumerate() {
            let found = row_ids(&addressing, index, Tokens::from(&classes).dead(&dead))?;
            let expected = expected
                .iter()
                .map(|of_layer| of_layer.get(index).map(Vec::as_slice))
                .collect::<Option<Vec<_>>>()
                .context("hash_ids of fewer layers than the configuration has")?;
            let name = format!("{}: layer{}.row_ids", get::<String>(case, "name")?, layer.layer());
            report.integers(&name, &found, &expected.concat());
        }
    }
    Ok(())
}

/// The addressing of the demonstration's configuration values.
pub(crate) fn config(golden: &Value) -> Result<AddressConfig> {
    Ok(AddressConfig {
        seed: get(golden, "seed")?,
        layers: get(golden, "layer_ids")?,
        max_order: get(golden, "max_ngram_size")?,
        heads: get(golden, "n_head_per_ngram")?,
        base_rows: get(golden, "engram_vocab_size")?,
        pad_id: get(golden, "pad_id")?,
        boundary: Boundary::None,
        arithmetic: Arithmetic::Exact,
    })
}

/// The value of `key`.
pub(crate) fn get<T: DeserializeOwned>(object: &Value, key: &str) -> Result<T> {
    let value = object.get(key).with_context(|| format!("`{key}` is missing"))?;
    T::deserialize(value).with_context(|| format!("`{key}`"))
}

fn cases(golden: &Value) -> Result<&Vec<Value>> {
    golden["cases"].as_array().context("`cases` is missing")
}

/// Row ids of one sequence in the layer's table, `[time, order, head]`.
pub(crate) fn row_ids(addressing: &Addressing, index: usize, tokens: Tokens<'_>) -> Result<Vec<u64>> {
    let mut ids = Vec::new();
    addressing.row_ids(index, tokens, &mut ids)?;
    Ok(ids)
}

/// Row ids counted from the first row of their own head.
pub(crate) fn head_ids(layer: &LayerAddress, row_ids: &[u64]) -> Vec<u64> {
    let sizes = layer.primes().iter().flatten();
    let first_rows: Vec<u64> =
        sizes.scan(0, |rows, size| Some(std::mem::replace(rows, *rows + size))).collect();
    row_ids.iter().zip(first_rows.iter().cycle()).map(|(id, first)| id - first).collect()
}

/// Integers as decimal strings, the form in which no reader rounds them.
pub(crate) fn strings(integers: &[i64]) -> Vec<String> {
    integers.iter().map(i64::to_string).collect()
}

/// A one-dimensional little-endian int32 array in numpy's format, version 1, of non-negative values.
pub(crate) fn npy_i32(path: &Path) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path)?;
    let Some((b"\x93NUMPY\x01\x00", rest)) = bytes.split_at_checked(8) else {
        bail!("no numpy file of version 1");
    };
    let (length, rest) = rest.split_first_chunk().context("cut off in its header")?;
    let (header, data) =
        rest.split_at_checked(u16::from_le_bytes(*length).into()).context("cut off in its header")?;
    ensure!(String::from_utf8_lossy(header).contains("'<i4'"), "not of type '<i4'");
    let (words, tail) = data.as_chunks::<4>();
    ensure!(tail.is_empty(), "{} bytes of data are not a whole number of int32", data.len());
    let class = |word: &[u8; 4]| u32::try_from(i32::from_le_bytes(*word)).context("a negative class");
    words.iter().map(class).collect()
}

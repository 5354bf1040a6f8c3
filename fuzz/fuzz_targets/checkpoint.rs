//! Published checkpoints: safetensors headers and the index of several files. What can be imported comes out
//! byte for byte; everything else is an error.
//!
//! Input: a byte of what to do, then JSON texts, each ended by a zero byte; what is left becomes tensors.
#![no_main]

use std::ops::ControlFlow;
use engram_fuzz::{file, folder, origin, take};
use engram_store::{Checkpoint, RowFormat, TableReader, TableTensors, export, import};
use libfuzzer_sys::fuzz_target;
use safetensors::tensor::Metadata;

/// Bytes of tensors that a file gets at most.
const LIMIT: usize = 1 << 18;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [what] = take(&mut rest);
    let layer = u64::from(what >> 4 & 1);
    let texts: Vec<&[u8]> = rest.splitn(4, |&byte| byte == 0).collect();
    let body = if texts.len() == 4 { texts[3] } else { &[] };
    let text = |i: usize| texts.get(i).copied().unwrap_or_default();
    let opened = match what % 4 {
        0 => Checkpoint::open(file("raw.safetensors", rest)),
        1 => Checkpoint::open(file("one.safetensors", &safetensors(text(0), body))),
        _ => {
            let index = file("model.safetensors.index.json", text(0));
            file("a.safetensors", &safetensors(text(1), body));
            file("b.safetensors", &safetensors(text(2), body));
            Checkpoint::open(index)
        }
    };
    match opened {
        Ok(checkpoint) => round_trip(checkpoint, layer),
        Err(error) => drop(error.to_string()),
    }
});

/// A file with the header `text`, and as many bytes of tensors as it promises.
fn safetensors(text: &[u8], body: &[u8]) -> Vec<u8> {
    let promised = serde_json::from_slice::<Metadata>(text).map_or(0, |metadata| metadata.data_len());
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(text);
    let tensors = body.iter().copied().chain((1..=251).cycle());
    file.extend(tensors.take(promised.min(LIMIT)));
    file
}

fn round_trip(mut checkpoint: Checkpoint, layer: u64) {
    assert!(checkpoint.names().all(|name| checkpoint.contains(name)));
    let Ok(tensors) = TableTensors::find(&checkpoint, layer) else { return };
    let path = folder().join("imported");
    let Ok(content) = import(&mut checkpoint, &tensors, origin(), &path, &mut |_| ControlFlow::Continue(())) else { return };
    let reader = TableReader::open(&path).expect("just imported");
    reader.verify(&mut |_| ControlFlow::Continue(())).expect("just imported");
    assert_eq!(reader.content(), content);

    let out = folder().join("exported.safetensors");
    match export(&path, &tensors, &out, u64::MAX, &mut |_| ControlFlow::Continue(())) {
        Ok(()) => {
            let mut checkpoint = Checkpoint::open(&out).expect("just exported");
            let again = folder().join("again");
            let same = import(&mut checkpoint, &tensors, origin(), &again, &mut |_| ControlFlow::Continue(()));
            assert_eq!(same.expect("just exported"), content);
        }
        // Rows that were split unevenly, or several times the same, cannot be split again in the same way.
        Err(error) => {
            assert!(tensors.weights.len() > 1 || !matches!(reader.header().format, RowFormat::F32), "{error}")
        }
    }
}

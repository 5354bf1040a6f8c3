//! The conformance example on three published modules, and on what it must refuse.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MODULE: &str = "module_n3_conv_zero.safetensors";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Runs the example, which `cargo test` builds beside the tests.
fn conformance(arguments: &[&Path]) -> Output {
    let tests = std::env::current_exe().unwrap();
    let example = tests.ancestors().nth(2).unwrap().join("examples/conformance");
    assert!(example.exists(), "{} is built by `cargo test` without a choice of targets", example.display());
    Command::new(example).args(arguments).output().unwrap()
}

#[track_caller]
fn expect(output: &Output, status: i32, text: &str) {
    let printed = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    assert_eq!(output.status.code(), Some(status), "{printed}");
    assert!(printed.contains(text), "{text:?} is not in {printed}");
}

/// A folder with one of the modules, some of its bytes changed.
fn damaged(change: impl Fn(&mut Vec<u8>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(golden().join(MODULE)).unwrap();
    change(&mut bytes);
    std::fs::write(folder.path().join(MODULE), bytes).unwrap();
    folder
}

/// Where the tensor `name` lies in the file.
fn range(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let (header, info) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
    let (start, end) = info.info(name).unwrap().data_offsets;
    header + 8 + start..header + 8 + end
}

#[test]
fn published_modules_are_reproduced() {
    let output = conformance(&[&golden()]);
    expect(&output, 0, "tensors agree");
    let printed = String::from_utf8(output.stdout).unwrap();
    // Five modules: 11 tensors with one stream, 16 with two, 26 with four; multipliers and primes of each.
    assert_eq!(printed.matches("\n  ok").count(), 11 + 2 * 16 + 2 * 26 + 5 * 2, "{printed}");
}

#[test]
fn composed_modules_are_reproduced_where_no_score_is_near_zero() {
    let folder = damaged(|_| ());
    expect(&conformance(&[Path::new("--composed"), folder.path()]), 0, "tensors agree");
}

#[test]
fn one_changed_value_is_a_miss() {
    for name in [
        "layer2.out",
        "layer2.grad.norm1.0.weight",
        "layer2.grad_unique_rows",
        "layer2.param.value_proj.bias",
    ] {
        let folder = damaged(|bytes| {
            let at = range(bytes, name).start;
            let value = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) + 1e-2;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        });
        expect(&conformance(&[folder.path()]), 1, "MISS");
    }
}

#[test]
fn not_a_number_is_a_miss() {
    let folder = damaged(|bytes| {
        let at = range(bytes, "layer2.grad_hidden").start;
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    expect(&conformance(&[folder.path()]), 1, "MISS  layer2.grad_hidden");
}

#[test]
fn wrong_multipliers_are_a_miss() {
    let folder = damaged(|bytes| {
        let at = bytes.windows(14).position(|text| text == b"76507469730479").unwrap();
        bytes[at] = b'8';
    });
    expect(&conformance(&[folder.path()]), 1, "MISS  layer2.multipliers");
}

#[test]
fn bad_input_is_refused() {
    expect(&conformance(&[]), 2, "usage: conformance");
    expect(&conformance(&[Path::new("--fast"), &golden()]), 2, "usage: conformance");
    if cfg!(not(feature = "cuda")) {
        expect(&conformance(&[Path::new("--cuda"), &golden()]), 2, "build with `--features cuda`");
    }
    expect(&conformance(&[Path::new("no/such/folder")]), 2, "cannot list no/such/folder");
    let empty = tempfile::tempdir().unwrap();
    expect(&conformance(&[empty.path()]), 2, "holds no module_*.safetensors");
    expect(&conformance(&[damaged(|bytes| bytes.truncate(9000)).path()]), 2, MODULE);
    let renamed = damaged(|bytes| {
        let at = bytes.windows(9).position(|text| text == b"hidden_in").unwrap();
        bytes[at..at + 9].copy_from_slice(b"hidden_at");
    });
    expect(&conformance(&[renamed.path()]), 2, "no F32 tensor `layer2.hidden_in`");
}

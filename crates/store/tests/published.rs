//! Published tables come in and go out byte for byte; what does not fit together is refused by name.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow::Continue;
use std::path::Path;

use engram_store::{
    AddressIdentity, Checkpoint, RowFormat, RowSource, Table, TableHeader, TableOrigin, TableReader,
    TableTensors, export, fp8, import,
};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([5; 32]), layer: 1 }
}

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Written by the library that checkpoints are written with.
fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path).unwrap();
}

fn index(folder: &Path, tensors: &[(&str, &str)]) {
    let map: HashMap<_, _> = tensors.iter().copied().collect();
    let text = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

/// Every byte value, in an order that no two rows share.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let byte = |i: u64| ((i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (0..bytes as u64).map(byte).collect()
}

/// V4.1-Flash's table of a layer, with few rows.
fn deepseek(layer: u64, rows: usize) -> [Tensor; 2] {
    let name = |part| format!("layers.{layer}.engram.embed.{part}");
    [
        (name("weight"), Dtype::F8_E4M3, vec![rows, 256], noise(rows * 256, layer)),
        (name("scale"), Dtype::F8_E8M0, vec![rows, 8], noise(rows * 8, layer + 7)),
    ]
}

const QWEN: &str = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding";

fn qwen(shards: usize, rows: usize, scale: Option<[u8; 2]>) -> Vec<Tensor> {
    let (dtype, bytes) = if scale.is_some() { (Dtype::F8_E4M3, 160) } else { (Dtype::BF16, 320) };
    let shard =
        |k| (format!("{QWEN}.shard_{k}.weight"), dtype, vec![rows, 160], noise(rows * bytes, k as u64));
    let scale = scale.map(|scale| (format!("{QWEN}.weight_scale"), Dtype::BF16, vec![1], scale.to_vec()));
    (0..shards).map(shard).chain(scale).collect()
}

fn import_all(source: &Path, target: &Path) -> engram_store::Result<()> {
    let mut checkpoint = Checkpoint::open(source)?;
    let tensors = TableTensors::find(&checkpoint, 1)?;
    import(&mut checkpoint, &tensors, origin(), target, &mut |_| Continue(())).map(drop)
}

#[test]
fn deepseeks_layout_round_trips_and_scales_come_to_lie_behind_their_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // More rows than are moved or read at a time (8 MiB), in files of one tensor each.
    let rows = 40_009;
    let [weight, scale] = deepseek(1, rows);
    write(&path("a.safetensors"), std::slice::from_ref(&weight));
    write(&path("b.safetensors"), std::slice::from_ref(&scale));
    index(
        folder.path(),
        &[
            (&weight.0, "a.safetensors"),
            (&scale.0, "b.safetensors"),
            ("embed.weight", "never-downloaded.safetensors"),
        ],
    );
    import_all(folder.path(), &path("table")).unwrap();
    let header = TableHeader::read(path("table")).unwrap();
    assert_eq!((header.rows, header.width, header.format), (rows as u64, 256, RowFormat::Fp8E4m3));
    let table = Table::open(path("table"), &origin()).unwrap();
    table.verify().unwrap();
    let mut values = vec![0.0; 256];
    for id in [0, 1, 15_887, 31_775, 40_008] {
        let row = [&weight.3[id * 256..][..256], &scale.3[id * 8..][..8]].concat();
        assert_eq!(table.row_bytes(id as u64).unwrap(), row);
        table.gather(&[id as u64], &mut values).unwrap();
        let wanted = |i: usize| fp8::e4m3_to_f32(row[i]) * fp8::e8m0_to_f32(row[256 + i / 32]);
        assert!((0..256).all(|i| values[i] == wanted(i) || values[i].is_nan() && wanted(i).is_nan()));
    }
    // Out again: in files of one tensor, and in one file as the library would write both.
    let out = path("out");
    fs::create_dir(&out).unwrap();
    let tensors = TableTensors::deepseek(1);
    export(path("table"), &tensors, &out, 1, &mut |_| Continue(())).unwrap();
    let same = |a: &Path, b: &Path| fs::read(a).unwrap() == fs::read(b).unwrap();
    assert!(same(&out.join("model-00001-of-00002.safetensors"), &path("a.safetensors")));
    assert!(same(&out.join("model-00002-of-00002.safetensors"), &path("b.safetensors")));
    import_all(&out, &path("again")).unwrap();
    assert!(same(&path("again"), &path("table")));
    export(path("table"), &tensors, path("one.safetensors"), 0, &mut |_| Continue(())).unwrap();
    write(&path("both.safetensors"), &[weight, scale]);
    assert!(same(&path("one.safetensors"), &path("both.safetensors")));
}

#[test]
fn qwens_layout_round_trips_in_fp8_and_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // The published 128 shards, in numeric and not in alphabetic order; a scale near the published 0.000199.
    for scale in [Some([0x51, 0x39]), None] {
        let tensors = qwen(128, 300, scale);
        write(&path("source.safetensors"), &tensors);
        import_all(&path("source.safetensors"), &path("table")).unwrap();
        let header = TableHeader::read(path("table")).unwrap();
        assert_eq!((header.rows, header.width), (128 * 300, 160));
        match header.format {
            RowFormat::Fp8E4m3OneScale(found) => assert_eq!(found.get().to_bits(), 0x3951_0000),
            format => assert!(format == RowFormat::Bf16 && scale.is_none()),
        }
        let table = Table::open(path("table"), &origin()).unwrap();
        let row_bytes = header.format.bytes_per_row(160);
        for id in [0, 299, 300, 3_000, 38_399] {
            assert_eq!(
                table.row_bytes(id).unwrap(),
                &tensors[id as usize / 300].3[id as usize % 300 * row_bytes..][..row_bytes]
            );
        }
        let names = TableTensors::qwen(1, 128, scale.is_some());
        export(path("table"), &names, path("out.safetensors"), 0, &mut |_| Continue(())).unwrap();
        assert!(fs::read(path("out.safetensors")).unwrap() == fs::read(path("source.safetensors")).unwrap());
    }
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (file, table) = (folder.path().join("model.safetensors"), folder.path().join("table"));
    let refused = |tensors: &[Tensor]| {
        write(&file, tensors);
        let said = import_all(folder.path(), &table).unwrap_err().to_string();
        assert!(!table.exists() && said.contains("safetensors") || said.contains("layer 1"), "{said}");
        said
    };
    let [weight, scale] = deepseek(1, 10);
    assert!(refused(std::slice::from_ref(&weight)).contains("no tensor layers.1.engram.embed.scale"));
    let short = (scale.0.clone(), Dtype::F8_E8M0, vec![9, 8], noise(72, 0));
    assert!(refused(&[weight.clone(), short]).contains("[9, 8], but weights of [10, 256] need"));
    let wrong = (scale.0.clone(), Dtype::I16, vec![1], vec![0; 2]);
    assert!(refused(&[weight.clone(), wrong]).contains("scales are F8_E8M0"));
    let integers = (weight.0.clone(), Dtype::I8, vec![10, 256], noise(2560, 0));
    assert!(refused(&[integers, scale.clone()]).contains("weights of I8 have no scale"));
    let mut gap = qwen(4, 3, None);
    gap.remove(2);
    assert!(refused(&gap).contains("3 shards of the table of layer 1, but not"));
    assert!(refused(&deepseek(2, 3)).contains("no table of layer 1"));
    assert!(refused(&qwen(2, 3, Some([0, 0]))).contains("scale is 0, but must be finite and above 0"));

    // Truncated and foreign files, and an index that leads elsewhere.
    write(&file, &[weight, scale]);
    let good = fs::read(&file).unwrap();
    for length in [0, 7, 8, 100, good.len() - 1] {
        fs::write(&file, &good[..length]).unwrap();
        let said = import_all(&file, &table).unwrap_err().to_string();
        assert!(said.contains("model.safetensors: not a readable checkpoint, at byte"), "{said}");
    }
    for bad in ["../x.safetensors", "/etc/x", "a/b", "", "."] {
        index(folder.path(), &[("layers.1.engram.embed.weight", bad)]);
        assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("not beside it"), "{bad}");
    }
    assert!(!table.exists());
}

#[test]
fn formats_that_safetensors_has_not_are_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let mut writer = engram_store::TableWriter::create(&path, 5, 32, RowFormat::Int8, origin()).unwrap();
    writer.push(&[1.0; 160]).unwrap();
    writer.finish().unwrap();
    let out = folder.path().join("out.safetensors");
    let said =
        export(&path, &TableTensors::deepseek(1), &out, 0, &mut |_| Continue(())).unwrap_err().to_string();
    assert!(said.contains("convert it first") && !out.exists(), "{said}");
    assert_eq!(TableReader::open(&path).unwrap().header().rows, 5);
}

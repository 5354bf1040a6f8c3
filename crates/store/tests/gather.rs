//! Gathering gives exactly the rows asked for, whatever the format, the place, the batch and the threads.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use engram_store::{
    AddressIdentity, DistinctRows, RowFormat, RowSource, Storage, StoreError, Table, TableOrigin, TableScale,
    fp8,
};
use proptest::prelude::*;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([3; 32]), layer: 2 }
}

fn formats() -> [RowFormat; 7] {
    let one_scale = RowFormat::Fp8E4m3OneScale(TableScale::new(0.5).unwrap());
    [
        RowFormat::F32,
        RowFormat::Bf16,
        RowFormat::F16,
        RowFormat::Fp8E4m3,
        one_scale,
        RowFormat::Int8,
        RowFormat::Int4,
    ]
}

/// Small halves: representable in every format but the integers, different for every row and column nearby.
fn value(id: u64, column: usize) -> f32 {
    ((id * 7 + column as u64 * 3) % 29) as f32 * 0.5 - 7.0
}

fn fill(id: u64, row: &mut [f32]) {
    row.iter_mut().enumerate().for_each(|(column, out)| *out = value(id, column));
}

fn table(rows: u64, width: usize, format: RowFormat, storage: &Storage) -> Table {
    Table::from_fn(rows, width, format, origin(), storage, fill).unwrap()
}

fn gathered(source: &dyn RowSource, ids: &[u64]) -> Vec<f32> {
    let mut out = vec![f32::NAN; ids.len() * source.width()];
    source.gather(ids, &mut out).unwrap();
    out
}

/// The rows as the format keeps them, one at a time.
fn wanted(ids: &[u64], width: usize, format: RowFormat) -> Vec<f32> {
    let mut out = vec![0.0; ids.len() * width];
    let mut bytes = vec![0; format.bytes_per_row(width)];
    for (&id, row) in ids.iter().zip(out.chunks_mut(width)) {
        fill(id, row);
        format.encode_row(row, &mut bytes);
        let exact = row.to_vec();
        format.decode_row(&bytes, row);
        assert!(matches!(format, RowFormat::Int8 | RowFormat::Int4) || row == exact);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn each_row_arrives_at_its_place(
        rows in 1..300u64,
        width in 1..100usize,
        format in prop::sample::select(formats().to_vec()),
        ids in prop::collection::vec(any::<u64>(), 0..400),
    ) {
        let table = table(rows, width, format, &Storage::Ram);
        let ids: Vec<u64> = ids.into_iter().map(|id| id % rows).collect();
        prop_assert_eq!(gathered(&table, &ids), wanted(&ids, width, format));
    }

    #[test]
    fn distinct_rows_expanded_are_the_batch(
        width in 1..40usize,
        ids in prop::collection::vec(0..60u64, 0..3000),
    ) {
        let table = table(60, width, RowFormat::Bf16, &Storage::Ram);
        let distinct = DistinctRows::of(&ids);
        let rows = gathered(&table, distinct.ids());
        let mut expanded = vec![f32::NAN; ids.len() * width];
        distinct.expand(&rows, width, &mut expanded).unwrap();
        prop_assert_eq!(expanded, gathered(&table, &ids));
    }
}

#[test]
fn ram_mapped_and_file_give_the_same_rows_at_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<u64> = (0..20_000u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 5_003).collect();
    for format in formats() {
        let width = 72;
        let wanted = wanted(&ids, width, format);
        let path = folder.path().join(format.to_string());
        let ram = table(5_003, width, format, &Storage::Ram);
        let mapped = table(5_003, width, format, &Storage::MappedIn(folder.path().to_owned()));
        mapped.save(&path).unwrap();
        let opened = Table::open(&path, &origin()).unwrap();
        opened.verify().unwrap();
        let read = Table::read(&path, &origin(), &Storage::Ram).unwrap();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for table in [&ram, &mapped, &opened, &read] {
                assert_eq!((table.rows(), table.width(), table.format()), (5_003, width, format));
                assert_eq!(pool.install(|| gathered(table, &ids)), wanted, "{format}, {threads} threads");
            }
        }
    }
}

#[test]
fn an_id_outside_the_table_is_named_and_nothing_is_written() {
    let table = table(50, 4, RowFormat::F32, &Storage::Ram);
    for (ids, position, row) in
        [(vec![3, 50, 99], 1, 50), (vec![u64::MAX], 0, u64::MAX), (vec![0, 49, 51], 2, 51)]
    {
        let mut out = vec![-1.0; ids.len() * 4];
        let refused = table.gather(&ids, &mut out).unwrap_err();
        let StoreError::RowOutOfRange { row: named, position: at, rows: 50 } = refused else {
            panic!("{refused}");
        };
        assert_eq!((named, at), (row, position));
        let said = refused.to_string();
        assert!(
            said.contains(&format!("row {row}, at position {position} ")) && said.contains("50 rows"),
            "{said}"
        );
        assert!(out.iter().all(|&value| value == -1.0), "no row of a refused batch is delivered");
    }
    assert!(table.row_bytes(50).is_err());
    assert!(matches!(
        table.gather(&[1], &mut [0.0; 3]),
        Err(StoreError::WrongLength { expected: 4, found: 3, .. })
    ));
}

#[test]
fn fp8_rows_keep_their_scales_behind_their_values() {
    let table = Table::from_fn(3, 256, RowFormat::Fp8E4m3, origin(), &Storage::Ram, |id, row| {
        row.fill(fp8::E4M3_MAX * 2f32.powi(id as i32));
    })
    .unwrap();
    for id in 0..3 {
        let row = table.row_bytes(id).unwrap();
        assert_eq!(row.len(), 264);
        assert!(
            row[..256].iter().all(|&code| code == 0x7e) && row[256..].iter().all(|&s| s == 127 + id as u8)
        );
    }
}

#[test]
fn tables_that_cannot_exist_are_refused() {
    let build =
        |rows, width| Table::from_fn(rows, width, RowFormat::F32, origin(), &Storage::Ram, fill).unwrap_err();
    assert!(build(0, 4).to_string().contains("rows is 0, but must be at least 1"));
    assert!(build(4, 0).to_string().contains("width is 0"));
    assert!(build(u64::MAX, 4).to_string().contains("few enough"));
    assert!(build(1 << 50, 16).to_string().contains("bytes of RAM"), "more than this machine has");
}

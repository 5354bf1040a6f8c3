//! A saved table comes back bit for bit, or not at all.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use engram_store::{
    AddressIdentity, RowFormat, RowInit, RowOptimizer, RowSource, Storage, StoreError, Table, TableHeader,
    TableOrigin, TrainableTable,
};

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([0xab; 32]), layer: 14 }
}

fn trained(rows: u64, width: usize, optimizer: RowOptimizer) -> TrainableTable {
    let init = RowInit::Normal { deviation: 1.0, seed: 1 };
    let mut table = TrainableTable::new(rows, width, init, optimizer, origin(), &Storage::Ram).unwrap();
    for seed in 0..3 {
        step(&mut table, seed);
    }
    table
}

fn step(table: &mut TrainableTable, seed: u64) {
    let ids: Vec<u64> = (0..table.rows()).filter(|id| !(id + seed).is_multiple_of(3)).collect();
    let mut grads = vec![0.0; ids.len() * table.width()];
    RowInit::Normal { deviation: 1.0, seed }.fill(7, &mut grads);
    table.update(&ids, &grads, 0.01).unwrap();
}

fn values(table: &dyn RowSource) -> Vec<u32> {
    let mut out = vec![0.0; table.rows() as usize * table.width()];
    table.gather(&(0..table.rows()).collect::<Vec<_>>(), &mut out).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

/// Every reader that promises to look at all bytes.
fn load_fully(path: &Path) -> Result<TrainableTable, StoreError> {
    let loaded = TrainableTable::load(path, &origin(), &Storage::Ram);
    let verified = Table::open(path, &origin()).and_then(|table| table.verify());
    assert_eq!(loaded.is_ok(), verified.is_ok(), "load and verify agree");
    loaded
}

#[test]
fn training_goes_on_after_loading_as_if_nothing_had_happened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    // The second has several blocks of checksums, whose last is partly filled.
    for (rows, width) in [(5, 3), (9_001, 40)] {
        let optimizers = [
            RowOptimizer::adam(),
            RowOptimizer::AdamByRow { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
            RowOptimizer::row_wise_adam(),
            RowOptimizer::balanced_momentum(),
        ];
        for optimizer in optimizers {
            let mut table = trained(rows, width, optimizer);
            table.save(&path).unwrap();
            for storage in [Storage::Ram, Storage::MappedIn(folder.path().to_owned())] {
                let loaded = TrainableTable::load(&path, &origin(), &storage).unwrap();
                assert_eq!((loaded.step(), loaded.optimizer(), loaded.origin()), (3, optimizer, origin()));
                assert!(values(&loaded) == values(&table));
                let again = folder.path().join("again");
                loaded.save(&again).unwrap();
                assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap(), "state and all");
            }
            let mut loaded = TrainableTable::load(&path, &origin(), &Storage::Ram).unwrap();
            (3..6).for_each(|seed| {
                [&mut table, &mut loaded].map(|table| step(table, seed)).into_iter().collect()
            });
            assert!(values(&loaded) == values(&table));
            fs::remove_file(folder.path().join("again")).unwrap();
        }
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the saved table is left behind");
}

#[test]
fn a_trained_table_is_also_a_table_to_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let table = trained(300, 20, RowOptimizer::adam());
    table.save(&path).unwrap();
    let opened = Table::open(&path, &origin()).unwrap();
    assert_eq!(values(&opened), values(&table));
    assert_eq!(values(&Table::read(&path, &origin(), &Storage::Ram).unwrap()), values(&table));
    let header = TableHeader::read(&path).unwrap();
    assert_eq!(
        (header.rows, header.width, header.format, header.origin),
        (300, 20, RowFormat::F32, origin())
    );
    assert_eq!(header.training, Some((RowOptimizer::adam(), 3)));

    // Saved again it is smaller, and no longer trainable as it is.
    opened.save(&path).unwrap();
    let refused = TrainableTable::load(&path, &origin(), &Storage::Ram).unwrap_err().to_string();
    assert!(refused.contains("without optimiser state"), "{refused}");
    assert_eq!(values(&opened), values(&table), "the mapped file was replaced, not rewritten");
    fs::write(&path, "something else").unwrap();
    opened.verify().expect("the file that is mapped is verified, not the one that now has its name");
}

#[test]
fn every_flipped_bit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    trained(400, 5, RowOptimizer::row_wise_adam()).save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let put = |byte: usize, value: u8| {
        let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(byte as u64)).and_then(|_| file.write_all(&[value])).unwrap();
    };
    // A stride coprime to every power of two visits all parts (header, rows, state, padding, checksums) and
    // all bits; the fields of the header are visited whole.
    for bit in (0..152 * 8).chain((0..good.len() * 8).step_by(61)) {
        let byte = bit / 8;
        put(byte, good[byte] ^ 1 << (bit % 8));
        let refused = load_fully(&path).expect_err(&format!("bit {bit} was flipped")).to_string();
        assert!(refused.contains(path.to_str().unwrap()) && refused.contains("at byte"), "{refused}");
        put(byte, good[byte]);
    }
    load_fully(&path).unwrap();
}

#[test]
fn damage_is_reported_with_the_offset_of_its_block() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    trained(9_001, 40, RowOptimizer::adam()).save(&path).unwrap();
    let mut bad = fs::read(&path).unwrap();
    bad[4096 + (1 << 20) + 77] ^= 4;
    fs::write(&path, &bad).unwrap();
    match load_fully(&path).unwrap_err() {
        StoreError::Damaged { offset, .. } => assert_eq!(offset, 4096 + (1 << 20)),
        other => panic!("{other}"),
    }
}

#[test]
fn every_other_length_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    trained(700, 5, RowOptimizer::adam()).save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let lengths = (0..good.len()).step_by(97).chain([4095, 4096, 4097, good.len() - 32, good.len() - 1]);
    for length in lengths {
        fs::write(&path, &good[..length]).unwrap();
        let refused = load_fully(&path).expect_err(&format!("cut to {length}")).to_string();
        assert!(refused.contains(&format!("at byte {length}:")), "{refused}");
    }
    fs::write(&path, [good.as_slice(), &[0]].concat()).unwrap();
    assert!(load_fully(&path).unwrap_err().to_string().contains("but its header promises"));
}

#[test]
fn foreign_newer_and_misplaced_files_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    assert!(load_fully(&path).unwrap_err().to_string().contains("cannot open the table"));

    fs::write(&path, vec![b'x'; 10_000]).unwrap();
    assert!(load_fully(&path).unwrap_err().to_string().contains("does not begin with ENGRAMTB"));

    trained(7, 5, RowOptimizer::adam()).save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let mut newer = good.clone();
    newer[8] = 2;
    fs::write(&path, newer).unwrap();
    assert!(load_fully(&path).unwrap_err().to_string().contains("version 2"));

    fs::write(&path, &good).unwrap();
    let other = TableOrigin { identity: AddressIdentity::from_bytes([0xcd; 32]), layer: 1 };
    for refused in [
        TrainableTable::load(&path, &other, &Storage::Ram).unwrap_err(),
        Table::open(&path, &other).unwrap_err(),
        Table::read(&path, &other, &Storage::Ram).unwrap_err(),
    ] {
        let said = refused.to_string();
        assert!(said.contains(&"ab".repeat(32)) && said.contains(&"cd".repeat(32)), "both are named: {said}");
        assert!(said.contains("layer 14") && said.contains("layer 1 "), "{said}");
    }
}

#[test]
fn a_failed_save_leaves_the_old_table() {
    let folder = tempfile::tempdir().unwrap();
    let table = trained(7, 5, RowOptimizer::adam());
    let refused = table.save(folder.path().join("no/such/folder/table")).unwrap_err().to_string();
    assert!(refused.contains("no/such/folder") && refused.contains("cannot create a file"), "{refused}");

    // A folder in the way cannot be replaced by a file.
    let blocked = folder.path().join("blocked");
    fs::create_dir(&blocked).unwrap();
    assert!(table.save(&blocked).unwrap_err().to_string().contains("put the file in place"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
}

/// Elsewhere the blocks are claimed by writing zeros, which would take too long here.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_without_room_for_a_mapped_table_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::MappedIn(folder.path().to_owned());
    let (init, optimizer) = (RowInit::Zeros, RowOptimizer::adam());
    let refused = TrainableTable::new(1 << 45, 64, init, optimizer, origin(), &storage).unwrap_err();
    assert!(matches!(&refused, StoreError::Memory { .. }), "{refused}");
    assert!(refused.to_string().contains(folder.path().to_str().unwrap()), "{refused}");
}

/// Bytes of a file that this process has mapped and in memory.
#[cfg(target_os = "linux")]
fn mapped_bytes(path: &std::path::Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
    let resident = lines.find_map(|line| line.strip_prefix("Rss:")).expect("the file is mapped");
    resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[cfg(target_os = "linux")]
fn a_mapped_table_stays_within_its_limit_and_gives_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let (rows, width) = (120_000, 66);
    let fill = |id: u64, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(i, v)| *v = (id * 66) as f32 + i as f32)
    };
    Table::from_fn(rows, width, RowFormat::F32, origin(), &Storage::Ram, fill).unwrap().save(&path).unwrap();
    let free = Table::open(&path, &origin()).unwrap();
    assert_eq!(free.resident_bytes(), None);
    const LIMIT: u64 = 1 << 20;
    let table = Table::open_with(&path, &origin(), &engram_store::MapOptions::new().resident(LIMIT)).unwrap();
    let mut state = 1u64;
    let mut ids = |count: usize| -> Vec<u64> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % rows
        };
        (0..count).map(|_| next()).collect()
    };
    drop(free);
    for count in [1, 100, 3000, 20_000, 7, 60_000] {
        let ids = ids(count);
        table.prefetch(&ids[..count / 2]).unwrap();
        let mut found = vec![0.0; count * width];
        table.gather(&ids, &mut found).unwrap();
        for (&id, row) in ids.iter().zip(found.chunks(width)) {
            assert!(row[0] == (id * 66) as f32 && row[65] == (id * 66) as f32 + 65.0, "row {id}");
        }
        let known = table.resident_bytes().unwrap();
        assert!(known <= LIMIT, "{count} rows: {known} bytes");
        // What the system says, neighbours that faults mapped included.
        let mapped = mapped_bytes(&path);
        assert!(mapped <= LIMIT, "{count} rows: {mapped} bytes are mapped, {known} are known of");
    }
    let too_little =
        Table::open_with(&path, &origin(), &engram_store::MapOptions::new().resident(4096)).unwrap_err();
    assert!(too_little.to_string().contains("at least 1 MiB"), "{too_little}");
}

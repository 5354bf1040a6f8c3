//! What the targets share: files in memory, and checksums that are right, so that mutations get past them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use engram_address::AddressIdentity;
use engram_store::{RowFormat, TableOrigin, TableScale};

/// Where the targets' files belong.
pub fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 }
}

/// One folder per process, in memory where the system has such a place.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let shared = Path::new("/dev/shm");
        let place = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        tempfile::tempdir_in(place).expect("a temporary folder")
    };
    FOLDER.get_or_init(make).path()
}

/// Writes a new file in the folder. The old one is removed, not rewritten: it may be mapped.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).expect("a file in memory");
    path
}

/// Takes the first `N` bytes of `input`, zeros where it ends.
pub fn take<const N: usize>(input: &mut &[u8]) -> [u8; N] {
    let (now, later) = input.split_at(N.min(input.len()));
    *input = later;
    std::array::from_fn(|i| now.get(i).copied().unwrap_or(0))
}

/// Every format, by number.
pub fn format(number: u8, scale: f32) -> Option<RowFormat> {
    Some(match number % 7 {
        0 => RowFormat::F32,
        1 => RowFormat::Bf16,
        2 => RowFormat::Fp8E4m3,
        3 => RowFormat::F16,
        4 => RowFormat::Fp8E4m3OneScale(TableScale::new(scale).ok()?),
        5 => RowFormat::Int8,
        _ => RowFormat::Int4,
    })
}

/// Bytes of a page, and of a block that has a checksum.
pub const PAGE: usize = 4096;
const BLOCK: usize = 1 << 20;

/// A table file as `docs/table-file.md` has it, with the first bytes of its header from `header`, its sections
/// cut from `body` (as often repeated as needed), and all checksums right. `None` where it would have more
/// than `limit` bytes.
pub fn sealed_table(header: &[u8], body: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut file = header.to_vec();
    file.resize(PAGE, 0);
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| file[at + i]));
    let (rows, width) = (usize::try_from(word(16)).ok()?, usize::try_from(word(24)).ok()?);
    let row_bytes = format(file[12], 1.0)?.bytes_per_row(width.min(limit));
    let state = match file[80] {
        1 => vec![4 * width.min(limit); 2],
        2 => vec![4],
        _ => vec![],
    };
    let mut bytes = body.iter().copied().cycle().chain(std::iter::repeat(0));
    let mut list = Vec::new();
    for per_row in std::iter::once(row_bytes).chain(state) {
        let section = rows.checked_mul(per_row)?;
        if file.len().checked_add(section)? > limit {
            return None;
        }
        let start = file.len();
        file.extend(bytes.by_ref().take(section));
        file.resize(file.len().next_multiple_of(PAGE), 0);
        file[start..].chunks(BLOCK).for_each(|block| list.extend_from_slice(blake3::hash(block).as_bytes()));
    }
    let hash = blake3::hash(&list);
    file[120..152].copy_from_slice(hash.as_bytes());
    file.extend_from_slice(&list);
    seal(&mut file);
    Some(file)
}

/// Makes the checksum of a file's first page right.
pub fn seal(file: &mut [u8]) {
    let hash = blake3::hash(&file[..PAGE - 32]);
    file[PAGE - 32..PAGE].copy_from_slice(hash.as_bytes());
}

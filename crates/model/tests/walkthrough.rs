//! The code of `docs/adding-a-variant.md` is that of the files which it names.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

#[test]
fn every_block_of_code_stands_in_the_file_that_it_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = std::fs::read_to_string(root.join("docs/adding-a-variant.md")).unwrap();
    let blocks: Vec<&str> = page.split("```rust\n").skip(1).collect();
    assert!(blocks.len() >= 5, "{} blocks", blocks.len());
    for block in blocks {
        let code = block.split_once("```").unwrap().0;
        let (file, code) = code.split_once('\n').unwrap();
        let file = file.strip_prefix("// ").unwrap();
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        assert!(text.contains(code), "{file} does not contain:\n{code}");
    }
}

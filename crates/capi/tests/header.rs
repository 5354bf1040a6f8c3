//! `include/engram.h` is what cbindgen makes of the functions. `ENGRAM_WRITE_HEADER=1 cargo test -p engram-capi --test header`
//! writes it anew.
#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

use std::path::Path;

#[test]
fn the_header_is_that_of_the_functions() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in ["failure.rs", "interface.rs"] {
        builder = builder.with_src(folder.join("src").join(file));
    }
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let path = folder.join("include/engram.h");
    if std::env::var_os("ENGRAM_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    assert_eq!(String::from_utf8(made).unwrap(), std::fs::read_to_string(path).unwrap());
}

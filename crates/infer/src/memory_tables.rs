//! The tables of a checkpoint: which file holds the rows of which memory layer.

use std::path::{Path, PathBuf};

use engram_address::{AddressError, Addressing, Vocabulary};
use engram_config::{Compression, MemoryConfig};
use engram_data::TextTokenizer;
use engram_store::{StoreError, TableHeader, TableOrigin};

/// The addressing of a memory, and a table file for each of its layers.
#[derive(Debug, Clone)]
pub struct MemoryTables {
    addressing: Addressing,
    row_width: usize,
    files: Vec<PathBuf>,
}

/// Tables that are not those of a memory.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The memory and the tokenizer do not fit.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A file cannot be read, or is not a table.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A table of another memory.
    #[error("{}: {problem}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What it holds, and what is needed.
        problem: String,
    },
}

impl MemoryTables {
    /// The tables in a checkpoint's folder.
    ///
    /// # Errors
    /// When the memory and the tokenizer do not fit, or a file is missing, damaged or of another memory.
    pub fn open(memory: &MemoryConfig, tokenizer: &TextTokenizer, folder: &Path) -> Result<Self, TableError> {
        let vocabulary = match memory.compression {
            Compression::Normalised => Vocabulary::from_tokenizer(tokenizer)?,
            Compression::None => Vocabulary::identity(tokenizer.get_vocab_size(true)),
        };
        let addressing = Addressing::new(&memory.addressing(), vocabulary)?;
        let file = |&layer: &usize| folder.join(format!("memory.layer{layer}.table"));
        let files: Vec<PathBuf> = memory.layers.iter().map(file).collect();
        let tables = Self { addressing, row_width: memory.row_width, files };
        for (place, path) in tables.files.iter().enumerate() {
            tables.check(place, path, &TableHeader::read(path)?)?;
        }
        Ok(tables)
    }

    /// Takes the rows of a layer from another file, which says which layer's it holds.
    ///
    /// # Errors
    /// When the file is damaged, no table, or of another memory.
    pub fn replace(&mut self, path: &Path) -> Result<(), TableError> {
        let header = TableHeader::read(path)?;
        let layer = header.origin.layer;
        let Some(place) = self.addressing.layers().iter().position(|own| own.layer() as u64 == layer) else {
            let problem = format!("it holds rows of layer {layer}, in which the model has no memory");
            return Err(TableError::Other { path: path.to_owned(), problem });
        };
        self.check(place, path, &header)?;
        self.files[place] = path.to_owned();
        Ok(())
    }

    /// The addressing.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// The file of each memory layer, in order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    fn check(&self, place: usize, path: &Path, header: &TableHeader) -> Result<(), TableError> {
        let layer = &self.addressing.layers()[place];
        let needed = TableOrigin { identity: self.addressing.identity(), layer: layer.layer() as u64 };
        let (width, rows) = (header.width, header.rows);
        let problem = if header.origin != needed {
            format!("it holds rows of {}, but the model reads those of {needed}", header.origin)
        } else if width != self.row_width {
            format!("its rows have {width} values, but the model takes {}", self.row_width)
        } else if rows != layer.rows() {
            format!("it has {rows} rows, but the model addresses {}", layer.rows())
        } else {
            return Ok(());
        };
        Err(TableError::Other { path: path.to_owned(), problem })
    }
}

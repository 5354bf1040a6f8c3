//! Options that choose the addressing and layer of a table's rows.

use clap::Args;
use engram_address::AddressIdentity;
use engram_store::TableOrigin;

use crate::commands::addressing::{AddressingOptions, Loaded};
use crate::failure::refuse;

/// An addressing and a layer, or their names.
#[derive(Debug, Args)]
pub(super) struct OriginOptions {
    #[command(flatten)]
    addressing: AddressingOptions,
    /// Identity of the addressing (64 hexadecimal digits), if its parts are not available.
    #[arg(long, value_name = "HEX", conflicts_with_all = ["config", "preset", "checkpoint", "tokenizer"])]
    identity: Option<AddressIdentity>,
    /// Layer of the model, counted from 0. Optional if the addressing has memory in only one layer.
    #[arg(long, value_name = "L")]
    layer: Option<u64>,
}

/// The addressing and layer of a table's rows, and what follows from them.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) origin: TableOrigin,
    /// Number of rows of the addressing; unknown if only its identity is.
    pub(super) rows: Option<u64>,
    pub(super) loaded: Option<Loaded>,
}

impl OriginOptions {
    /// The origin that the options name.
    pub(super) fn load(&self) -> anyhow::Result<Origin> {
        if let Some(identity) = self.identity {
            let Some(layer) = self.layer else {
                return refuse("--identity needs --layer, the layer of the rows");
            };
            return Ok(Origin { origin: TableOrigin { identity, layer }, rows: None, loaded: None });
        }
        let Some(loaded) = self.addressing.load_if_named()? else {
            return refuse(
                "name the addressing of the rows: --config or --preset with a --tokenizer, a --checkpoint, or \
                 an --identity with a --layer",
            );
        };
        let (_, layer) = loaded.layer(self.layer)?;
        let origin = TableOrigin { identity: loaded.addressing.identity(), layer: layer.layer() as u64 };
        Ok(Origin { origin, rows: Some(layer.rows()), loaded: Some(loaded) })
    }
}

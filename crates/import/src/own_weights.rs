//! The weights of our own checkpoints.

use std::path::Path;

use engram_config::ModelConfig;
use engram_kernels::BlockFormat;

use crate::error::{Error, Result};
use crate::safetensors_folder::SafetensorsFolder;
use crate::weight::Weights;

/// Maps the weights of a checkpoint, by the names that it has.
///
/// # Errors
/// A file that cannot be read, or whose tensors are not f32 or not those of the configuration's vocabulary.
pub(crate) fn read(path: &Path, config: &ModelConfig) -> Result<Weights> {
    let file = SafetensorsFolder::of_file(path)?;
    let mut weights = Weights::inputs_first();
    for name in file.names() {
        let weight = file.weight(&name)?;
        if weight.format() != BlockFormat::F32 {
            return Err(Error::model(
                path,
                format!("tensor `{name}` is {}, not F32", weight.format().name()),
            ));
        }
        weights.insert(name, weight.aligned());
    }
    let embedding = weights.get("embedding").map(|found| found.shape().to_vec());
    if embedding != Some(vec![config.vocabulary, config.width]) {
        let expected = [config.vocabulary, config.width];
        let problem = format!("tensor `embedding` is not {expected:?}, as the configuration says");
        return Err(Error::model(path, problem));
    }
    Ok(weights)
}

//! Keys that files still have by their old names.

use toml::{Table, Value};

use crate::error::ConfigError;

/// Says in today's keys what `document` says in old ones; whether it had any.
///
/// `train.accumulation`, into how many micro-batches a step is divided, becomes `train.micro_batch`, the number of
/// sequences computed at once.
///
/// # Errors
/// A value that no step can have, or both keys.
pub(crate) fn translate(document: &mut Table) -> Result<bool, ConfigError> {
    let Some(train) = document.get_mut("train").and_then(Value::as_table_mut) else { return Ok(false) };
    // Values of other types are refused where the file is read.
    let number = |key: &str| train.get(key).and_then(Value::as_integer);
    let (Some(parts), Some(batch)) = (number("accumulation"), number("batch")) else { return Ok(false) };
    let refuse = |reason: String| Err(ConfigError::new("train.accumulation", reason));
    if train.contains_key("micro_batch") {
        return refuse("is the old form of `micro_batch`, which is given too: leave it out".into());
    }
    if parts < 1 || parts > batch.max(1) {
        return refuse(format!(
            "is {parts}, but a batch of {batch} has 1 to {batch} micro-batches; write `micro_batch`, the number of \
             sequences computed at once"
        ));
    }
    train.remove("accumulation");
    if parts > 1 {
        train.insert("micro_batch".into(), Value::Integer((batch - 1) / parts + 1));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn train(lines: &str) -> Table {
        format!("[train]\n{lines}").parse().unwrap()
    }

    proptest! {
        #[test]
        fn every_sequence_is_in_one_of_as_many_parts_at_most(batch in 1_i64..200, parts in 1_i64..200) {
            let mut document = train(&format!("batch = {batch}\naccumulation = {parts}"));
            let translated = translate(&mut document);
            if parts > batch {
                prop_assert!(translated.unwrap_err().to_string().contains("micro_batch"));
            } else {
                prop_assert!(translated.unwrap());
                let train = document["train"].as_table().unwrap();
                let at_once = train.get("micro_batch").map_or(batch, |value| value.as_integer().unwrap());
                prop_assert!((1..=batch).contains(&at_once) && at_once * parts >= batch);
                prop_assert!(!train.contains_key("accumulation"));
            }
        }
    }

    #[test]
    fn what_says_nothing_old_stays() {
        for lines in ["batch = 4", "batch = 4\nmicro_batch = 2", "batch = 4\naccumulation = \"two\""] {
            let mut document = train(lines);
            assert!(!translate(&mut document).unwrap());
            assert_eq!(document, train(lines));
        }
        let both = translate(&mut train("batch = 4\naccumulation = 2\nmicro_batch = 2")).unwrap_err();
        assert!(both.to_string().contains("leave it out"), "{both}");
        assert!(translate(&mut train("batch = 4\naccumulation = 0")).is_err());
    }
}

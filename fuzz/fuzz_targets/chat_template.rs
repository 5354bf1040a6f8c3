//! Chat templates: any text is a template or an error, and rendering one ends soon, with a text or an error.
//!
//! Input: the template itself, or a whole `tokenizer_config.json` where it begins with `{"`.
#![no_main]

use engram_infer::{ChatTemplate, Conversation, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    let template = if input.starts_with("{\"") {
        ChatTemplate::from_tokenizer_config(input)
    } else {
        ChatTemplate::new(input.to_owned(), "<s>".into(), "</s>".into()).map(Some)
    };
    let Ok(Some(template)) = template else { return };
    let turns = [("system", "Be kind."), ("user", "Who was\n Ada?"), ("assistant", "{{ x }}"), ("user", "é🐋")];
    let turns = turns.map(|(role, content)| Message::new(role, content));
    for messages in [&turns[..], &turns[1..2], &[]] {
        let _ = template.render(messages);
    }
    let tools = serde_json::json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let tools = serde_json::from_value(tools).ok();
    let _ = template.render_all(&Conversation { messages: &turns, tools, ..Conversation::default() });
    let _ = template.end_token();
});

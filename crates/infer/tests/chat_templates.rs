//! Conversations as the reference implementation (`apply_chat_template` of transformers 5.24) writes them, by templates
//! in the style of fourteen families of models.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::collections::BTreeMap;

use chrono::DateTime;
use engram_infer::{ChatTemplate, Conversation, Message, TemplateValue};
use serde::Deserialize;

#[derive(Deserialize)]
struct Family {
    family: String,
    now: String,
    config: serde_json::Value,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Chat {
    name: String,
    messages: Vec<TemplateValue>,
    tools: Option<TemplateValue>,
    add_generation_prompt: bool,
    kwargs: BTreeMap<String, TemplateValue>,
    rendered: Option<String>,
    error: Option<String>,
}

fn message(fields: &TemplateValue) -> Message {
    let keys = fields.try_iter().unwrap();
    Message::from_fields(keys.map(|key| (key.as_str().unwrap().to_owned(), fields.get_item(&key).unwrap())))
}

#[test]
fn conversations_are_written_as_by_the_reference_implementation() {
    let families: Vec<Family> = serde_json::from_str(include_str!("golden/chats.json")).unwrap();
    let mut count = 0;
    for family in families {
        let now = DateTime::parse_from_rfc3339(&(family.now + "Z")).unwrap();
        let template = ChatTemplate::at(&family.config.to_string(), Some(now)).unwrap().unwrap();
        for chat in family.chats {
            let messages: Vec<Message> = chat.messages.iter().map(message).collect();
            let found = template.render_all(&Conversation {
                messages: &messages,
                tools: chat.tools,
                documents: None,
                variables: chat.kwargs,
                add_generation_prompt: chat.add_generation_prompt,
            });
            let place = format!("{} {}", family.family, chat.name);
            match (chat.rendered, chat.error) {
                (Some(rendered), _) => assert_eq!(found.unwrap(), rendered, "{place}"),
                (None, Some(error)) => assert!(found.unwrap_err().to_string().contains(&error), "{place}"),
                (None, None) => panic!("{place} expects nothing"),
            }
            count += 1;
        }
    }
    assert!(count > 25, "{count} conversations");
}

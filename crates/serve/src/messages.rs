//! Turns of a conversation as clients send them, and as a chat template sees them.

use engram_infer::{ChatTemplate, Message, TemplateValue};
use serde_json::Value;

use crate::api_error::ApiError;
use crate::call_style::{told, written};
use crate::fields::{is_blank, short};

/// Fields of a message that a template sees. Others must be null or empty, as in answers that are sent back.
const SEEN: [&str; 8] = [
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "reasoning",
];

/// The fields of a turn, in their order.
type Turn = Vec<(String, TemplateValue)>;

/// Reads `messages`, a JSON list, for `template`. Where that knows no developer, a turn of one becomes one of the system;
/// where it knows no tools, `tools`, calls and what they gave become text.
pub(crate) fn read(
    json: &str,
    template: &ChatTemplate,
    tools: Option<&TemplateValue>,
) -> Result<Vec<Message>, ApiError> {
    let messages: Vec<TemplateValue> = serde_json::from_str(json).map_err(|error| {
        ApiError::of("messages", format!("`messages` must be a list of objects: {error}"))
    })?;
    if messages.is_empty() {
        return Err(ApiError::of("messages", "`messages` is missing or empty"));
    }
    let knows_developer = template.mentions("developer");
    let read = |(index, message): (usize, &TemplateValue)| one(index, message, knows_developer);
    let mut turns = messages.iter().enumerate().map(read).collect::<Result<Vec<Turn>, _>>()?;
    if !template.mentions("tool") {
        turns.iter_mut().for_each(as_text);
        if let Some(tools) = tools {
            tell(&mut turns, &told(tools));
        }
    }
    Ok(turns.into_iter().map(Message::from_fields).collect())
}

fn text_of<'a>(turn: &'a [(String, TemplateValue)], name: &str) -> Option<&'a str> {
    turn.iter().find(|(found, _)| found == name).and_then(|(_, value)| value.as_str())
}

fn set(turn: &mut Turn, name: &str, text: String) {
    match turn.iter_mut().find(|(found, _)| found == name) {
        Some((_, value)) => *value = text.into(),
        None => turn.push((name.to_owned(), text.into())),
    }
}

/// Tells the model about tools, in the turn of the system.
fn tell(turns: &mut Vec<Turn>, about: &str) {
    match turns.first_mut().filter(|turn| text_of(turn, "role") == Some("system")) {
        Some(turn) => {
            let said = text_of(turn, "content").unwrap_or_default();
            let all = if said.is_empty() { about.to_owned() } else { format!("{said}\n\n{about}") };
            set(turn, "content", all);
        }
        None => {
            let turn = [("role", "system"), ("content", about)];
            turns.insert(0, turn.map(|(name, text)| (name.to_owned(), text.into())).to_vec());
        }
    }
}

/// Writes calls, and what they gave, as text.
fn as_text(turn: &mut Turn) {
    let content = text_of(turn, "content").unwrap_or_default().to_owned();
    if text_of(turn, "role") == Some("tool") {
        set(turn, "role", "user".into());
        set(turn, "content", format!("<tool_response>\n{content}\n</tool_response>"));
    }
    let Some(at) = turn.iter().position(|(name, _)| name == "tool_calls") else { return };
    let (_, calls) = turn.remove(at);
    let calls = calls.try_iter().into_iter().flatten().filter_map(|call| {
        let function = call.get_attr("function").ok()?;
        let name = function.get_attr("name").ok()?;
        let arguments = serde_json::to_string(&function.get_attr("arguments").ok()?).ok()?;
        Some(written(name.as_str()?, &arguments))
    });
    let said = (!content.is_empty()).then_some(content);
    set(turn, "content", said.into_iter().chain(calls).collect::<Vec<_>>().join("\n"));
}

fn one(index: usize, message: &TemplateValue, knows_developer: bool) -> Result<Turn, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let entries = entries(message).ok_or_else(|| {
        ApiError::of(format!("messages[{index}]"), format!("`messages[{index}]` must be an object"))
    })?;
    let (mut fields, mut refusal, mut has_role) = (Vec::new(), String::new(), false);
    for (name, value) in entries {
        let json = serde_json::to_value(&value).unwrap_or_default();
        let wrong = |problem: &str| {
            ApiError::of(at(&name), format!("`{}` {problem}, not {}", at(&name), short(&json.to_string())))
        };
        match &name[..] {
            "role" => {
                let role =
                    json.as_str().filter(|role| !role.is_empty()).ok_or_else(|| wrong("must be a text"))?;
                let role = if role == "developer" && !knows_developer { "system" } else { role };
                fields.push((name, TemplateValue::from(role)));
                has_role = true;
            }
            "content" => {
                fields.push((name.clone(), content(&json).map_err(|problem| wrong(&problem))?.into()))
            }
            "refusal" => refusal = json.as_str().unwrap_or_default().to_owned(),
            "type" if json == "message" || json == "text" => {}
            "tool_calls" if json.is_array() && !is_blank(&json) => {
                fields.push((name, with_arguments(&value)))
            }
            _ if is_blank(&json) => {}
            "tool_calls" => return Err(wrong("must be a list")),
            "function_call" if !json.is_object() => return Err(wrong("must be an object")),
            "name" | "tool_call_id" | "reasoning_content" | "reasoning" if !json.is_string() => {
                return Err(wrong("must be a text"));
            }
            name if SEEN.contains(&name) => fields.push((name.to_owned(), value)),
            _ => return Err(wrong("is unknown and must be null or empty").coded("unknown_parameter")),
        }
    }
    if !has_role {
        return Err(ApiError::of(at("role"), format!("`{}` is missing", at("role"))));
    }
    // What was not said is empty, and what was refused is what was said.
    match fields.iter_mut().find(|(name, _)| name == "content") {
        Some((_, content)) if content.as_str() == Some("") && !refusal.is_empty() => {
            *content = refusal.into()
        }
        Some(_) => {}
        None => fields.push(("content".to_owned(), refusal.into())),
    }
    Ok(fields)
}

/// The keys and values of an object, in their order.
pub(crate) fn entries(value: &TemplateValue) -> Option<Vec<(String, TemplateValue)>> {
    let is_object = matches!(serde_json::to_value(value), Ok(Value::Object(_)));
    let keys = value.try_iter().ok().filter(|_| is_object)?;
    keys.map(|key| Some((key.as_str()?.to_owned(), value.get_item(&key).ok()?))).collect()
}

/// A text, nothing, or a list of parts that are texts, which become one.
fn content(json: &Value) -> Result<String, String> {
    match json {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts.iter().map(part).collect(),
        _ => Err("must be a text or a list of parts of type `text`".into()),
    }
}

fn part(part: &Value) -> Result<String, String> {
    let kind = part["type"].as_str();
    let text = match kind {
        Some("text") => part["text"].as_str(),
        Some("refusal") => part["refusal"].as_str(),
        _ => return Err("takes parts of type `text` only".into()),
    };
    text.map(str::to_owned).ok_or_else(|| "has a part without its text".into())
}

/// Tool calls whose arguments are objects, as templates expect them; clients send the JSON of those as a text.
fn with_arguments(calls: &TemplateValue) -> TemplateValue {
    let replaced = |value: &TemplateValue, field: &str, change: &dyn Fn(&TemplateValue) -> TemplateValue| {
        let Some(entries) = entries(value) else { return value.clone() };
        let entries = entries.into_iter().map(|(name, value)| {
            let value = if name == field { change(&value) } else { value };
            (name, value)
        });
        TemplateValue::from_pairs(entries)
    };
    let parsed =
        |arguments: &TemplateValue| match arguments.as_str().map(serde_json::from_str::<TemplateValue>) {
            Some(Ok(object)) if entries(&object).is_some() => object,
            _ => arguments.clone(),
        };
    let function = |function: &TemplateValue| replaced(function, "arguments", &parsed);
    let Ok(calls) = calls.try_iter() else { return calls.clone() };
    calls.map(|call| replaced(&call, "function", &function)).collect()
}

#[cfg(test)]
mod tests {
    use engram_infer::ChatTemplate;

    use super::*;

    /// What a template that knows of tools sees of messages.
    fn seen(json: &str) -> String {
        seen_by("{{ messages|tojson }}{# tools #}", json, None)
    }

    fn seen_by(source: &str, json: &str, tools: Option<&TemplateValue>) -> String {
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        let messages = read(json, &template, tools);
        template.render(&messages.unwrap_or_else(|error| panic!("{json}: {}", error.json()))).unwrap()
    }

    #[test]
    fn a_template_without_tools_has_them_as_text() {
        let plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
        let turns = r#"[{"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
             "function": {"name": "f", "arguments": "{\"b\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "three"}]"#;
        let tools = serde_json::from_str(r#"[{"type": "function", "function": {"name": "f"}}]"#).unwrap();
        let found = seen_by(plain, turns, Some(&tools));
        assert!(found.starts_with("[system] # Tools\n"), "{found}");
        assert!(found.contains("{\"type\":\"function\",\"function\":{\"name\":\"f\"}}\n</tools>"), "{found}");
        let end = "[user] a\n[assistant] <tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\":1}}\n</tool_call>\n\
                   [user] <tool_response>\nthree\n</tool_response>\n";
        assert!(found.ends_with(end), "{found}");
        let told = seen_by(plain, r#"[{"role": "system", "content": "Be brief."}]"#, Some(&tools));
        assert!(told.starts_with("[system] Be brief.\n\n# Tools\n"), "{told}");
        let knows = "{% for m in messages %}[{{ m.role }}]{{ m.tool_calls }}{% endfor %}";
        assert!(seen_by(knows, turns, Some(&tools)).starts_with("[user][assistant][{'id': '1'"));
    }

    #[test]
    fn answers_can_be_sent_back() {
        let plain = r#"[{"role": "assistant", "content": "a"}]"#;
        for more in [
            r#""refusal": null"#,
            r#""refusal": null, "annotations": [], "audio": null, "function_call": null, "tool_calls": null"#,
            r#""tool_calls": [], "name": null, "reasoning_content": null, "reasoning": """#,
            r#""provider_specific_fields": {"refusal": null}, "images": [], "thinking_blocks": null"#,
            r#""type": "message""#,
            r#""type": "text""#,
        ] {
            assert_eq!(
                seen(&format!(r#"[{{"role": "assistant", "content": "a", {more}}}]"#)),
                plain,
                "{more}"
            );
        }
        let nothing = r#"[{"role": "assistant", "content": ""}]"#;
        assert_eq!(seen(r#"[{"role": "assistant", "content": null}]"#), nothing);
        assert_eq!(seen(r#"[{"role": "assistant"}]"#), nothing);
        assert_eq!(seen(r#"[{"role": "assistant", "content": null, "refusal": "a"}]"#), plain);
        assert_eq!(
            seen(
                r#"[{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}}]}]"#
            ),
            r#"[{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}], "content": ""}]"#
        );
    }

    #[test]
    fn content_may_come_in_parts() {
        assert_eq!(
            seen(
                r#"[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#
            ),
            r#"[{"role": "user", "content": "ab"}]"#
        );
        assert_eq!(
            seen(r#"[{"role": "developer", "content": "a"}]"#),
            r#"[{"role": "system", "content": "a"}]"#
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (json, place) in [
            ("[]", "messages"),
            (r#""a""#, "messages"),
            ("[3]", "messages[0]"),
            ("[[]]", "messages[0]"),
            (r#"[{"content": "a"}]"#, "messages[0].role"),
            (r#"[{"role": "user", "content": "a"}, {"role": "user", "content": 3}]"#, "messages[1].content"),
            (
                r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]"#,
                "messages[0].content",
            ),
            (r#"[{"role": "user", "content": [{"type": "text"}]}]"#, "messages[0].content"),
            (r#"[{"role": "user", "content": "a", "colour": "red"}]"#, "messages[0].colour"),
            (r#"[{"role": "user", "content": "a", "name": 3}]"#, "messages[0].name"),
            (r#"[{"role": 3}]"#, "messages[0].role"),
        ] {
            let template = ChatTemplate::new(String::new(), String::new(), String::new()).unwrap();
            let error = read(json, &template, None).map(|_| ()).expect_err(json).json();
            assert_eq!(error["error"]["param"], place, "{json}");
            assert!(error["error"]["message"].as_str().unwrap().contains(place), "{json}: {error}");
        }
    }
}

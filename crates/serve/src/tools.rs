//! `tools` and `tool_choice`: functions that an answer may call, or has to.

use engram_infer::TemplateValue;
use serde_json::{Value, json};

use crate::api_error::ApiError;
use crate::fields::{Fields, short};

/// Functions of a request at most.
const MOST_TOOLS: usize = 128;
/// Letters of a function's name at most.
const MOST_LETTERS: usize = 64;

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// The schema of its arguments.
    pub(crate) parameters: Value,
    /// Whether calls must follow all of the schema, or as much of it as is supported.
    pub(crate) strict: bool,
}

/// Functions, and whether one has to be called.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// All of them, as a template sees them.
    pub(crate) shown: TemplateValue,
    /// Those that may be called.
    pub(crate) callable: Vec<Tool>,
    /// Whether the answer is calls.
    pub(crate) required: bool,
    /// Whether there may be several.
    pub(crate) parallel: bool,
}

/// Which functions may be called.
enum Choice {
    None,
    Any { required: bool },
    Some { names: Vec<String>, required: bool, single: bool },
}

impl Tools {
    /// Reads a request's; none if no function may be called.
    pub(crate) fn read(fields: &Fields) -> Result<Option<Self>, ApiError> {
        let all: Vec<Value> = fields.get("tools")?.unwrap_or_default();
        let choice = choice(fields)?;
        if all.is_empty() {
            return match choice {
                Choice::None | Choice::Any { required: false } => Ok(None),
                _ => Err(ApiError::of(
                    "tool_choice",
                    "`tool_choice` asks for a call, but there are no `tools`",
                )),
            };
        }
        if all.len() > MOST_TOOLS {
            let problem = format!("`tools` has {} functions, but may have {MOST_TOOLS}", all.len());
            return Err(ApiError::of("tools", problem));
        }
        let mut callable = Vec::new();
        for (index, tool) in all.iter().enumerate() {
            let tool = one(index, tool)?;
            if callable.iter().any(|other: &Tool| other.name == tool.name) {
                let problem = format!("`tools` has two functions called {}", tool.name);
                return Err(ApiError::of("tools", problem));
            }
            callable.push(tool);
        }
        let parallel = fields.get("parallel_tool_calls")?.unwrap_or(true);
        let shown = fields.get::<TemplateValue>("tools")?.unwrap_or_default();
        match choice {
            Choice::None => Ok(None),
            Choice::Any { required } => Ok(Some(Self { shown, callable, required, parallel })),
            Choice::Some { names, required, single } => {
                if let Some(name) = names.iter().find(|name| callable.iter().all(|tool| tool.name != **name))
                {
                    let problem =
                        format!("`tool_choice` names {}, which is not among the `tools`", short(name));
                    return Err(ApiError::of("tool_choice", problem));
                }
                callable.retain(|tool| names.contains(&tool.name));
                Ok(Some(Self { shown, callable, required, parallel: parallel && !single }))
            }
        }
    }
}

fn choice(fields: &Fields) -> Result<Choice, ApiError> {
    let wrong = |value: &Value| {
        let problem = format!(
            "`tool_choice` is {}, but must be \"none\", \"auto\", \"required\", \
             {{\"type\": \"function\", \"function\": {{\"name\": …}}}} or {{\"type\": \"allowed_tools\", …}}",
            short(&value.to_string())
        );
        ApiError::of("tool_choice", problem)
    };
    let value = fields.get::<Value>("tool_choice")?.filter(|value| !value.is_null());
    let Some(value) = value else { return Ok(Choice::Any { required: false }) };
    let name = |tool: &Value| {
        let named = tool["type"] == "function";
        tool["function"]["name"].as_str().filter(|_| named).map(str::to_owned).ok_or_else(|| wrong(&value))
    };
    match value.as_str() {
        Some("none") => return Ok(Choice::None),
        Some("auto") => return Ok(Choice::Any { required: false }),
        Some("required") => return Ok(Choice::Any { required: true }),
        Some(_) => return Err(wrong(&value)),
        None => {}
    }
    if value["type"] != "allowed_tools" {
        return Ok(Choice::Some { names: vec![name(&value)?], required: true, single: true });
    }
    let allowed = &value["allowed_tools"];
    let required = match allowed["mode"].as_str() {
        Some("auto") => false,
        Some("required") => true,
        _ => return Err(wrong(&value)),
    };
    let names: Vec<String> = allowed["tools"]
        .as_array()
        .ok_or_else(|| wrong(&value))?
        .iter()
        .map(name)
        .collect::<Result<_, _>>()?;
    if names.is_empty() {
        return Err(wrong(&value));
    }
    Ok(Choice::Some { names, required, single: false })
}

fn one(index: usize, tool: &Value) -> Result<Tool, ApiError> {
    let wrong = |field: &str, problem: &str, found: &Value| {
        let place = format!("tools[{index}]{field}");
        ApiError::of(place.clone(), format!("`{place}` {problem}, not {}", short(&found.to_string())))
    };
    if tool["type"] != "function" {
        return Err(wrong(".type", "must be \"function\"", &tool["type"]));
    }
    let function = &tool["function"];
    let usual = |name: &&str| {
        let letters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        letters && (1..=MOST_LETTERS).contains(&name.len())
    };
    let name = function["name"].as_str().filter(usual).ok_or_else(|| {
        let problem = format!("must have 1 to {MOST_LETTERS} of the letters a-z, A-Z, 0-9, _, - and .");
        wrong(".function.name", &problem, &function["name"])
    })?;
    let parameters = match &function["parameters"] {
        Value::Null => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Value::Object(schema) => {
            let mut schema = schema.clone();
            let kind = schema.entry("type").or_insert_with(|| "object".into());
            if kind != "object" {
                return Err(wrong(".function.parameters.type", "must be \"object\"", kind));
            }
            Value::Object(schema)
        }
        other => return Err(wrong(".function.parameters", "must be a schema", other)),
    };
    let strict = match &function["strict"] {
        Value::Null => false,
        Value::Bool(strict) => *strict,
        other => return Err(wrong(".function.strict", "must be true or false", other)),
    };
    Ok(Tool { name: name.to_owned(), parameters, strict })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Option<Tools>, String> {
        let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        Tools::read(&fields).map_err(|error| error.json()["error"]["message"].as_str().unwrap().to_owned())
    }

    fn two() -> Value {
        json!([
            {"type": "function", "function": {"name": "clock"}},
            {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}, "strict": true}},
        ])
    }

    #[test]
    fn a_choice_says_what_may_be_called() {
        let names = |choice: Value| {
            let found = read(&json!({"tools": two(), "tool_choice": choice})).unwrap()?;
            let names: Vec<String> = found.callable.into_iter().map(|tool| tool.name).collect();
            Some((names.join(" "), found.required, found.parallel))
        };
        assert_eq!(names(json!("none")), None);
        assert_eq!(names(Value::Null), Some(("clock weather".into(), false, true)));
        assert_eq!(names(json!("auto")), Some(("clock weather".into(), false, true)));
        assert_eq!(names(json!("required")), Some(("clock weather".into(), true, true)));
        let function = json!({"type": "function", "function": {"name": "weather"}});
        assert_eq!(names(function.clone()), Some(("weather".into(), true, false)));
        let allowed =
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function]}});
        assert_eq!(names(allowed), Some(("weather".into(), false, true)));
        let found = read(&json!({"tools": two(), "parallel_tool_calls": false})).unwrap().unwrap();
        assert!(!found.parallel && !found.callable[0].strict && found.callable[1].strict);
        assert_eq!(found.callable[1].parameters["type"], "object");
        assert!(read(&json!({"tool_choice": "auto"})).unwrap().is_none());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let with = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        for (body, problem) in [
            (json!({"tool_choice": "required"}), "no `tools`"),
            (json!({"tools": two(), "tool_choice": "maybe"}), "\"maybe\""),
            (
                json!({"tools": two(), "tool_choice": {"type": "function", "function": {"name": "x"}}}),
                "names x",
            ),
            (json!({"tools": two(), "tool_choice": {"type": "custom"}}), "tool_choice"),
            (json!({"tools": two(), "tool_choice": {"type": "allowed_tools"}}), "tool_choice"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [3]}), "tools[0].type"),
            (with(json!({})), "tools[0].function.name"),
            (with(json!({"name": "a b"})), "tools[0].function.name"),
            (with(json!({"name": "a", "parameters": 3})), "tools[0].function.parameters"),
            (with(json!({"name": "a", "parameters": {"type": "string"}})), "parameters.type"),
            (with(json!({"name": "a", "strict": 3})), "tools[0].function.strict"),
            (json!({"tools": [two()[0], two()[0]]}), "two functions called clock"),
        ] {
            let error = read(&body).map(|_| ()).expect_err(&body.to_string());
            assert!(error.contains(problem), "{body}: {error}");
        }
    }
}

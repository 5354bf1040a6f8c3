"""The unmodified `openai` client against a running server: python3 openai_client.py URL MODEL"""

import json
import sys
from typing import Literal

import openai
import pydantic

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)

assert [entry.id for entry in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

# Completions: whole, streamed, with log-probabilities, several at once.
whole = client.completions.create(model=model, prompt="Queen Anne", max_tokens=12, temperature=0, logprobs=3)
choice = whole.choices[0]
assert choice.finish_reason == "length" and whole.usage.completion_tokens == 12, whole
assert len(choice.logprobs.tokens) == 12 and all(len(top) == 3 for top in choice.logprobs.top_logprobs)
assert all(max(top.values()) == own for top, own in zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs))
parts = list(
    client.completions.create(
        model=model, prompt="Queen Anne", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
)
assert "".join(part.choices[0].text for part in parts if part.choices) == choice.text
assert parts[-1].usage.completion_tokens == 12
several = client.completions.create(model=model, prompt=["Ada", "Queen"], n=2, max_tokens=4, seed=1, top_p=0.9)
assert [entry.index for entry in several.choices] == [0, 1, 2, 3]

# Conversations: whole, streamed, with log-probabilities.
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ada?"}]
answer = client.chat.completions.create(
    model=model, messages=messages, max_tokens=8, seed=3, logprobs=True, top_logprobs=2, stop=["User:"]
)
message = answer.choices[0].message
assert message.role == "assistant" and answer.object == "chat.completion"
assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in answer.choices[0].logprobs.content)
with client.chat.completions.stream(model=model, messages=messages, max_tokens=8, seed=3, stop=["User:"]) as stream:
    streamed = "".join(event.delta for event in stream if event.type == "content.delta")
    assert streamed == message.content, (streamed, message.content)

# A conversation of several turns: the answer's whole message is sent back.
turns = messages + [message.model_dump(), {"role": "user", "content": "More?"}]
again = client.chat.completions.create(model=model, messages=turns, max_tokens=4, seed=3, store=False, metadata={"a": "b"})
assert again.choices[0].message.content is not None
turns[2] = message  # The client takes its own object, too.
assert client.chat.completions.create(model=model, messages=turns, max_tokens=4, seed=3).choices

# A prompt's own probabilities.
echo = client.completions.create(model=model, prompt="Queen Anne", max_tokens=0, echo=True, logprobs=1).choices[0]
assert echo.text == "Queen Anne" and echo.logprobs.token_logprobs[0] is None and echo.logprobs.text_offset[0] == 0, echo

# Answers of a form: JSON, by a schema and by a class.
schema = {"type": "object", "properties": {"born": {"type": "integer", "minimum": 1, "maximum": 2000}}, "required": ["born"],
          "additionalProperties": False}
for stream in (False, True):
    form = {"type": "json_schema", "json_schema": {"name": "born", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model=model, messages=messages, response_format=form, max_tokens=200, seed=1, stream=stream)
    text = "".join(part.choices[0].delta.content or "" for part in found) if stream else found.choices[0].message.content
    assert 1 <= json.loads(text)["born"] <= 2000, text
assert client.chat.completions.create(
    model=model, messages=messages, response_format={"type": "json_object"}, max_tokens=9, temperature=0
).choices[0].message.content.startswith("{")


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Queen Anne"]
    born: int = pydantic.Field(ge=1000, le=1999)
    friends: list[Literal["Isaac", "Mary"]] = pydantic.Field(max_length=3)


parsed = client.chat.completions.parse(model=model, messages=messages, response_format=Person, max_tokens=400, seed=2)
assert isinstance(parsed.choices[0].message.parsed, Person), parsed
try:
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}}}
    client.chat.completions.create(model=model, messages=messages, response_format=wrong)
except openai.BadRequestError as error:
    assert "uniqueItems" in error.body["message"], error
else:
    raise AssertionError("a keyword that is not supported was taken")

# Functions: one that is named, any, perhaps one; in pieces; and what they gave.
parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
tools = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": parameters}},
         {"type": "function", "function": {"name": "clock"}}]
named = {"type": "function", "function": {"name": "weather"}}
for choice in (named, "required"):
    ask = dict(model=model, messages=messages, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=400,
               temperature=0)
    called = client.chat.completions.create(**ask).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None, called
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion().choices[0]
    calls = [[(call.function.name, call.function.arguments) for call in one.message.tool_calls] for one in (called, final)]
    assert calls[0] == calls[1] and final.finish_reason == "tool_calls", calls
    if choice is named:
        assert json.loads(calls[0][0][1])["city"] in ("Oslo", "Rome") and len(calls[0]) == 1, calls
        results = [{"role": "tool", "tool_call_id": call.id, "content": "Rain."} for call in called.message.tool_calls]
        turns = messages + [called.message] + results
        assert client.chat.completions.create(model=model, messages=turns, tools=tools, max_tokens=5).choices
for choice in ("auto", "none"):
    free = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice=choice, max_tokens=5, seed=4)
    assert choice == "auto" or not free.choices[0].message.tool_calls, free

# What is not of OpenAI's API goes in the extra body.
gates = client.completions.create(model=model, prompt="Ada", max_tokens=3, extra_body={"gates": True, "memory": False})
assert gates.choices[0].engram["gates"]

# Errors are the client's own kinds.
for kind, arguments in [
    (openai.BadRequestError, {"model": model, "prompt": "a", "max_tokens": 10**6}),
    (openai.BadRequestError, {"model": model, "prompt": "a", "temperature": -1}),
    (openai.NotFoundError, {"model": "another", "prompt": "a"}),
]:
    try:
        client.completions.create(**arguments)
    except kind as error:
        assert error.body["message"], error
    else:
        raise AssertionError(f"{arguments} was answered")
print("openai", openai.__version__, "is served")

"""The unmodified `litellm` against a running server: python3 litellm_client.py URL MODEL"""

import sys

import litellm

url, model = sys.argv[1:]
where = dict(model=f"openai/{model}", api_base=f"{url}/v1", api_key="any", num_retries=0)

messages = [{"role": "user", "content": "Ada?"}]
answer = litellm.completion(messages=messages, max_tokens=6, temperature=0, **where)
message = answer.choices[0].message
assert message.role == "assistant" and answer.usage.completion_tokens > 0, answer

# The whole message goes back, with what litellm adds to it.
turns = messages + [message.model_dump(), {"role": "user", "content": "More?"}]
assert litellm.completion(messages=turns, max_tokens=4, temperature=0, **where).choices

parts = list(litellm.completion(messages=messages, max_tokens=6, temperature=0, stream=True, **where))
streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert streamed == (message.content or ""), (streamed, message.content)

text = litellm.text_completion(prompt="Queen Anne", max_tokens=5, temperature=0, logprobs=2,
                               **{**where, "model": f"text-completion-openai/{model}"})
assert text.choices[0].text is not None, text
print("litellm is served")

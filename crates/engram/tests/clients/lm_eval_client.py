"""The unmodified `lm-evaluation-harness` against a running server: python3 lm_eval_client.py URL MODEL

Its two kinds of model for servers, asked as its tasks ask them: log-likelihoods of texts, and continuations.
"""

import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

url, model = sys.argv[1:]


def ask(kind, number, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=number)


text = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model=model, tokenizer_backend=None, tokenized_requests=False,
                           num_concurrent=1, max_retries=1)
pairs = [("Queen Anne", " was"), ("Ada", " said"), ("Ada", " zzz")]
found = text.loglikelihood([ask("loglikelihood", i, *pair) for i, pair in enumerate(pairs)])
assert len(found) == 3 and all(score <= 0 and isinstance(greedy, bool) for score, greedy in found), found
until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
assert len(text.generate_until([ask("generate_until", i, "Ada", until) for i in range(2)])) == 2

chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model=model, num_concurrent=1, max_retries=1)
prompt = chat.apply_chat_template([{"role": "user", "content": "Ada?"}])
assert len(chat.generate_until([ask("generate_until", 0, prompt, until)])) == 1
print("lm-evaluation-harness is served")

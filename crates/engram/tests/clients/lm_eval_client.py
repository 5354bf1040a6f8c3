"""The unmodified `lm-evaluation-harness` against a running server: python3 lm_eval_client.py URL MODEL

Its two kinds of model for servers, with tasks of their own: choices by likelihood, a text's likelihood, and generation. The
server cuts texts into tokens for it (`tokenizer_backend=auto` finds that out).
"""

import json
import os
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: \"{{question}}\"\ndoc_to_choice: \"{{choices}}\"\ndoc_to_target: answer\n"
              "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "say": "output_type: generate_until\ndoc_to_text: \"{{question}}\"\ndoc_to_target: said\ngeneration_kwargs:\n"
           "  until: [\"\\n\"]\n  max_gen_toks: 6\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n",
    "read": "output_type: loglikelihood_rolling\ndoc_to_text: \"\"\ndoc_to_target: \"{{question}}\"\nmetric_list:\n"
            "  - metric: word_perplexity\n",
}
RECORDS = [
    {"question": "Queen Anne", "choices": ["was", "zzz"], "answer": 0, "said": "x"},
    {"question": "Ada said", "choices": ["that", "qqq ppp"], "answer": 0, "said": "x"},
    {"question": "The sea", "choices": ["was", "is"], "answer": 1, "said": "x"},
]

url, model = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    data = os.path.join(folder, "data.jsonl")
    with open(data, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in RECORDS)
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        with open(os.path.join(folder, name + ".yaml"), "w") as file:
            file.write(head + task)
    manager = TaskManager(include_path=folder, include_defaults=False)
    settings = {"model": model, "num_concurrent": 1, "max_retries": 1, "max_length": 128}

    def evaluate(kind, path, tasks, **more):
        arguments = {"base_url": url + path, **settings}
        found = lm_eval.simple_evaluate(model=kind, model_args=arguments, tasks=tasks, task_manager=manager, log_samples=True,
                                        bootstrap_iters=0, cache_requests=False, **more)
        assert all(len(found["samples"][task]) == len(RECORDS) for task in tasks), found["samples"]
        return found

    found = evaluate("local-completions", "/v1/completions", ["choice", "say", "read"])
    assert 0 <= found["results"]["choice"]["acc,none"] <= 1, found["results"]
    assert found["results"]["read"]["word_perplexity,none"] > 1, found["results"]
    for sample in found["samples"]["choice"]:
        assert all(score <= 0 for score, _ in sample["filtered_resps"]), sample
    evaluate("local-chat-completions", "/v1/chat/completions", ["say"], apply_chat_template=True)
print("lm-evaluation-harness", lm_eval.__version__, "is served")

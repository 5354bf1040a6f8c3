"""lm-evaluation-harness against `engram serve`, beside `engram eval tasks` on the same questions, decision by decision.

    python benches/serving/harness.py MODEL DATA --count 200

MODEL is what `engram serve` takes; DATA is a folder with piqa.jsonl and arc_easy.jsonl (`query`, `choices`, `gold`), as
`configs/tasks` reads them. Needs Python with `lm-eval[api]`, and target/release/engram or $ENGRAM.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from limits import ENGRAM, Server  # noqa: E402

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
PROMPTS = {"piqa": "{{query}}Answer:", "arc_easy": "{{query}}\\nAnswer:"}


def harness(url, model, folder, data, count):
    for name, prompt in PROMPTS.items():
        with open(os.path.join(data, name + ".jsonl")) as whole, open(os.path.join(folder, name + ".jsonl"), "w") as part:
            part.writelines(line for line, _ in zip(whole, range(count)))
        with open(os.path.join(folder, name + ".yaml"), "w") as file:
            file.write(f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/{name}.jsonl\n"
                       f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: \"{prompt}\"\ndoc_to_choice: \"{{{{choices}}}}\"\n"
                       "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n")
    arguments = {"base_url": url + "/v1/completions", "model": model, "num_concurrent": 2, "max_retries": 1}
    found = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=list(PROMPTS), log_samples=True,
                                    task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0)
    by_question = {}
    for name in PROMPTS:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        by_question[name] = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    return by_question, found["results"]


def ours(model, folder, data, count):
    out = os.path.join(folder, "ours")
    tasks = [f"{ROOT}/configs/tasks/{name}.toml" for name in PROMPTS]
    subprocess.run([ENGRAM, "eval", "tasks", model, *tasks, "--data", data, "--max-records", str(count), "--out", out], check=True,
                   stdout=subprocess.DEVNULL)
    scores, characters = {}, {}
    for name in PROMPTS:
        with open(os.path.join(out, name + ".jsonl")) as file:
            rows = sorted((json.loads(line) for line in list(file)[1:]), key=lambda row: row["question"])
        scores[name] = [row["choice"]["log_probabilities"] for row in rows]
        characters[name] = [[length["characters"] for length in row["choice"]["lengths"]] for row in rows]
    return scores, characters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    best = lambda scores: max(range(len(scores)), key=lambda index: scores[index])
    with tempfile.TemporaryDirectory() as folder:
        one, characters = ours(options.model, folder, options.data, options.count)
        with Server(options.model, "--model-name", "model", "--dtype", "f32") as server:
            other, results = harness(f"http://127.0.0.1:{server.port}", "model", folder, options.data, options.count)
    wrong = 0
    for name in PROMPTS:
        pairs = list(zip(one[name], other[name], characters[name]))
        same = sum(best(a) == best(b) for a, b, _ in pairs)
        each = lambda scores, lengths: [score / length for score, length in zip(scores, lengths)]
        normed = sum(best(each(a, lengths)) == best(each(b, lengths)) for a, b, lengths in pairs)
        largest = max(abs(x - y) for a, b, _ in pairs for x, y in zip(a, b))
        scores = {key: value for key, value in results[name].items() if key.startswith("acc")}
        print(f"{name}: {same} of {len(pairs)} decisions agree, {normed} per character; log-likelihoods differ by {largest:.1e} at "
              f"most; the harness says {scores}")
        wrong += len(pairs) - same
    sys.exit(1 if wrong else 0)


main()

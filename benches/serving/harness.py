"""lm-evaluation-harness against `engram serve`, beside `engram eval tasks` on the same questions, decision by decision.

    python benches/serving/harness.py MODEL DATA [--tasks piqa boolq …] [--count 200] [--dtype f32]

MODEL is what `engram serve` takes; DATA is the folder that `configs/tasks` read. Both programs get the same records and
the prompts of `configs/tasks`: the harness's task definitions are made of the same files. What the files choose by
chance is fixed for both: GSM8K's eight examples are the last of its file here. A disagreement is printed with what both say,
and makes the exit status 1. Needs Python with `lm-eval[api]`, and target/release/engram or $ENGRAM.
"""

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from limits import ENGRAM, Server  # noqa: E402

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs/tasks"
SUBJECTS = ["abstract_algebra", "anatomy", "college_medicine", "marketing", "world_religions"]
TASKS = ["piqa", "arc_easy", "hellaswag", "lambada", "gsm8k", "boolq", *(f"mmlu_{subject}" for subject in SUBJECTS)]
SHOTS = 8


def json_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def write_lines(path, records):
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class Task:
    """A task of `configs/tasks`: its records, and what is asked of them."""

    def __init__(self, name, data, count):
        self.name, self.shots = name, []
        self.config = tomllib.loads((CONFIGS / f"{'mmlu' if name.startswith('mmlu_') else name}.toml").read_text())
        self.kind = next(kind for kind in ("multiple_choice", "cloze", "generation") if kind in self.config)
        self.asked = self.config[self.kind]
        read = self.of_mmlu if name.startswith("mmlu_") else getattr(self, f"of_{name}", self.of_lines)
        self.records = read(data)[:count]

    def of_lines(self, data):
        return json_lines(data / self.config["data"])

    def of_hellaswag(self, data):
        lines = (data / self.config["data"]).read_text().split("\n")
        records = [dict(zip(self.config["line_fields"], lines[at : at + 6])) for at in range(0, len(lines) - 5, 6)]
        endings = lambda record: [record[f"ending_{number}"] for number in range(4)]
        return [record | {"choices": endings(record), "gold": int(record["answer"])} for record in records]

    def of_gsm8k(self, data):
        *records, = self.of_lines(data)
        self.shots = records[-SHOTS:]
        return records[:-SHOTS]

    def of_mmlu(self, data):
        def read(split):
            with open(data / f"mmlu/{split}/{self.name[5:]}_{split}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            return [row | {"choices": list("ABCD"), "gold": int(row["answer"])} for row in rows]

        self.shots = read("dev")
        return read("test")

    def definition(self, folder):
        """The harness's definition of the task."""
        files = {"test": f"{folder}/{self.name}.jsonl"}
        write_lines(files["test"], self.records)
        found = {"task": self.name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        found |= {"doc_to_text": self.asked["prompt"], "num_fewshot": 0}
        if self.kind == "multiple_choice":
            found |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
            found["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
        elif self.kind == "cloze":
            found |= {"output_type": "loglikelihood", "doc_to_target": " " + self.asked["target"]}
            found |= {"target_delimiter": "", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]}
        else:
            found |= {"output_type": "generate_until", "doc_to_target": self.asked["shown"]}
            found["generation_kwargs"] = {"until": self.asked["stop"], "max_gen_toks": self.asked["tokens"], "do_sample": False}
            found["filter_list"] = [{"name": "strict-match", "filter": [
                {"function": "regex", "regex_pattern": self.asked["extract"]["pattern"]}, {"function": "take_first"}]}]
            ignored = [*self.asked["remove"], "(?s).*#### "]
            found["metric_list"] = [{"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": ignored}]
        if self.shots:
            files["shots"] = f"{folder}/{self.name}_shots.jsonl"
            write_lines(files["shots"], self.shots)
            found |= {"fewshot_split": "shots", "num_fewshot": len(self.shots), "fewshot_config": {"sampler": "first_n"}}
        if preamble := self.config.get("preamble"):
            subject = self.name.removeprefix("mmlu_").replace("_", " ")
            head, _ = preamble.split("{{")
            found["description"] = f"{head}{subject}{preamble.split('}}')[1]}"
        return found

    def ours(self, model, data, dtype, folder):
        """What `engram eval tasks` says, question by question."""
        kind, path = self.name.split("_")[0], CONFIGS / f"{self.name}.toml"
        changes = {
            "gsm8k": ("count = 8", f'count = {SHOTS}\ndata = "gsm8k_shots.jsonl"\nchoose = "first"'),
            "mmlu": ('data = "mmlu/test"', f'data = "mmlu/test/{self.name[5:]}_test.csv"'),
        }
        if kind in changes:
            path = pathlib.Path(folder) / f"{self.name}.toml"
            path.write_text((CONFIGS / f"{kind}.toml").read_text().replace(*changes[kind]))
        if kind == "gsm8k":
            data = folder
            write_lines(f"{folder}/gsm8k.jsonl", self.records)
            write_lines(f"{folder}/gsm8k_shots.jsonl", self.shots)
        out = pathlib.Path(folder) / f"ours-{self.name}"
        command = [ENGRAM, "eval", "tasks", model, path, "--data", data, "--max-records", str(len(self.records)), "--out", out,
                   "--dtype", dtype]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return sorted(json_lines(out / f"{self.name}.jsonl")[1:], key=lambda answer: answer["question"])


def harness(url, tasks, folder):
    """What the harness says, question by question, of each task."""
    for task in tasks:
        # YAML reads JSON.
        (pathlib.Path(folder) / f"{task.name}.yaml").write_text(json.dumps(task.definition(folder)))
    # Four at a time share the reading of weights. The harness gives up after five minutes otherwise, which a busy machine takes.
    arguments = {"base_url": url + "/v1/completions", "model": "model", "num_concurrent": 4, "max_retries": 1, "max_length": 2048,
                 "timeout": 3600}
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=[task.name for task in tasks],
                                    log_samples=True, task_manager=manager, bootstrap_iters=0)
    in_order = lambda name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return {task.name: in_order(task.name) for task in tasks}, found["results"]


def best(scores):
    """The first of the largest."""
    return max(range(len(scores)), key=scores.__getitem__)


def decisions(task, ours, theirs):
    """Of each question: our decision and theirs, and how far the likelihoods are apart."""
    if task.kind == "multiple_choice":
        one, other = ours["choice"]["log_probabilities"], [score for score, _ in theirs["filtered_resps"]]
        lengths = [length["characters"] for length in ours["choice"]["lengths"]]
        each = lambda scores: best([score / length for score, length in zip(scores, lengths)])
        return (best(one), each(one)), (best(other), each(other)), max(abs(a - b) for a, b in zip(one, other))
    if task.kind == "cloze":
        one, (other, greedy) = ours["cloze"], theirs["filtered_resps"][0]
        return one["greedy"], bool(greedy), abs(one["log_probability"] - other)
    return ours["generation"]["score"] == 1.0, theirs["exact_match"] == 1.0, 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16", "int8", "file"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(name, options.data, options.count) for name in options.tasks]
        ours = {task.name: task.ours(options.model, options.data, options.dtype, folder) for task in tasks}
        with Server(options.model, "--model-name", "model", "--dtype", options.dtype) as server:
            theirs, results = harness(f"http://127.0.0.1:{server.port}", tasks, folder)
    for task in tasks:
        pairs = list(zip(ours[task.name], theirs[task.name], strict=True))
        compared = [decisions(task, one, other) for one, other in pairs]
        apart = [index for index, (one, other, _) in enumerate(compared) if one != other]
        for index in apart:
            print(f"  {task.name} {index}: {json.dumps(pairs[index][0])} and {pairs[index][1]['filtered_resps']}")
        scores = {key: value for key, value in results[task.name].items() if key.startswith(("acc", "exact", "perplexity"))}
        largest = max(difference for _, _, difference in compared)
        print(f"{task.name}: {len(pairs) - len(apart)} of {len(pairs)} decisions agree; log-likelihoods differ by {largest:.1e} at "
              f"most; the harness says {scores}", flush=True)
        wrong += len(apart)
    sys.exit(1 if wrong else 0)


main()

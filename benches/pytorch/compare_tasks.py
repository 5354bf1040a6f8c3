"""Sets answers of `engram eval tasks --out` beside those of llama_tasks.py, question by question.

    python compare_tasks.py results/piqa.jsonl piqa.jsonl
    python compare_tasks.py logits ours.npy theirs.npy
"""

import json
import sys

import numpy as np


def logits(ours, theirs):
    ours, theirs = np.load(ours), np.load(theirs)
    print(f"{len(ours)} prompts: logits differ by {np.abs(ours - theirs).max():.2e} at most")


def answers(ours, theirs):
    ours = sorted((json.loads(line) for line in list(open(ours))[1:]), key=lambda row: row["question"])
    theirs = [json.loads(line) for line in open(theirs)]
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    agree, agree_character, largest, right = 0, 0, 0.0, [0, 0]
    for one, other in zip(ours, theirs):
        if "cloze" in one:
            found = [one["cloze"]["log_probability"]]
            pair = (one["cloze"]["greedy"], other["greedy"][0])
            right[0] += pair[0]
            right[1] += pair[1]
        else:
            choice = one["choice"]
            found = choice["log_probabilities"]
            pair = (int(np.argmax(found)), other["best"])
            characters = [length["characters"] for length in choice["lengths"]]
            best = int(np.argmax(np.array(found) / characters))
            agree_character += best == other["best_per_character"]
            right[0] += pair[0] == choice["answer"]
            right[1] += pair[1] == other["gold"]
        agree += pair[0] == pair[1]
        largest = max(largest, np.abs(np.array(found) - other["log_probabilities"]).max())
    count = len(ours)
    print(f"{count} questions: {agree} decisions agree ({agree / count:.2%}), "
          f"{agree_character} per character; right {right[0]} and {right[1]}; "
          f"log-probabilities differ by {largest:.2e} at most")


if sys.argv[1] == "logits":
    logits(*sys.argv[2:])
else:
    answers(*sys.argv[1:])

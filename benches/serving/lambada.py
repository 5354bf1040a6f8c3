"""The last words of LAMBADA's passages, greedily, from a running server.

    python3 benches/serving/lambada.py http://127.0.0.1:8000 lambada_openai.jsonl --limit 2000 --save f32.json
    python3 benches/serving/lambada.py http://127.0.0.1:8000 lambada_openai.jsonl --limit 2000 --against f32.json

A passage counts when the tokens that a server generates after its context spell the last word: what the common harness
calls the accuracy of `lambada_openai`. With --against, the difference from other answers, question by question, with
its standard error: what rounding the weights does. Needs nothing but Python.
"""

import argparse
import json
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen


def ask(url, path, body):
    request = Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=600) as reply:
        return json.load(reply)


def right(url, question):
    context, word = question["context"], " " + question["continuation"]
    count = lambda text: len(ask(url, "/tokenize", {"prompt": text})["tokens"])
    tokens = count(context + word) - count(context)
    answer = ask(url, "/v1/completions", {"prompt": context, "max_tokens": tokens, "temperature": 0})
    return answer["choices"][0]["text"] == word


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("questions")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--save", help="file for the answers")
    parser.add_argument("--against", help="file with other answers to the same questions")
    arguments = parser.parse_args()
    with open(arguments.questions) as file:
        questions = [json.loads(line) for line in file][: arguments.limit]
    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as clients:
        answers = list(clients.map(lambda question: right(arguments.url, question), questions))
    accuracy = statistics.mean(answers)
    error = math.sqrt(accuracy * (1 - accuracy) / len(answers))
    print(f"{len(answers)} passages in {time.perf_counter() - start:.0f} s: {accuracy:.4f} +- {error:.4f}")
    if arguments.save:
        with open(arguments.save, "w") as file:
            json.dump(answers, file)
    if arguments.against:
        with open(arguments.against) as file:
            others = json.load(file)
        if len(others) != len(answers):
            raise SystemExit(f"{arguments.against} has {len(others)} answers, not {len(answers)}")
        differences = [a - b for a, b in zip(answers, others)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        print(f"differs from {arguments.against} by {statistics.mean(differences):+.4f} +- {error:.4f}")


main()

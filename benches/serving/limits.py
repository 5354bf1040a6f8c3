"""What a server promises under pressure, measured: chats beyond the cache, large prompts, a slow tier.

    engram quickstart --out quick
    python3 benches/serving/limits.py chats quick/memory
    python3 benches/serving/limits.py health quick/memory
    python3 benches/serving/limits.py redis quick/memory quick/memory/checkpoints/step-00000180/memory.layer1.table

chats   64 chats at once without `max_tokens` on a default server; then with a tenth of the cache that they took, where
        each answer must be the same; then as many at once as fit that cache, so that nobody loses a place.
health  the time that /health takes while eight clients send prompts of 4 MB.
redis   the time after which a request fails whose rows come one each 0.3 s, with `--row-timeout 2`.

Needs nothing but Python, and target/release/engram or $ENGRAM.
"""

import argparse
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

from slow_redis import SlowRedis

ENGRAM = os.environ.get("ENGRAM", os.path.join(os.path.dirname(__file__), "../../target/release/engram"))


class Server:
    """A server at a free port, until the `with` ends."""

    def __init__(self, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [ENGRAM, "serve", *map(str, arguments), "--port", str(self.port)]
        self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(600):
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.1)
            if self.child.poll() is not None:
                sys.exit("the server did not start")
        sys.exit("the server did not answer within a minute")

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()

    def ask(self, method, path, body=None, timeout=600):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, text

    def metric(self, name):
        text = self.ask("GET", "/metrics")[1].decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def together(count, work):
    """Results of `work(0)` to `work(count - 1)`, all at once, and the seconds that they took."""
    results = [None] * count

    def run(index):
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.perf_counter() - begun


def crowd(count, template, *arguments):
    """Answers to `count` chats at once, and what it took."""
    with Server(*arguments, "--chat-template", template, "--clip-max-tokens") as server:
        most = {"engram_running_requests": 0, "engram_cache_pages_in_use": 0}
        done = threading.Event()

        def watch():
            while not done.is_set():
                for name in most:
                    most[name] = max(most[name], server.metric(name))
                time.sleep(0.05)

        def chat(index):
            messages = [{"role": "user", "content": f"Tell me story number {index}, of the king and the whale."}]
            body = json.dumps({"messages": messages, "temperature": 0.8, "seed": index})
            status, text = server.ask("POST", "/v1/chat/completions", body)
            assert status == 200, text
            answer = json.loads(text)
            return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

        watcher = threading.Thread(target=watch)
        watcher.start()
        answers, seconds = together(count, chat)
        done.set()
        watcher.join()
        pages = server.metric("engram_cache_pages")
        lost, again = (server.metric(f"engram_{name}_total") for name in ("preempted_requests", "recomputed_tokens"))
        tokens = sum(tokens for _, tokens in answers)
        print(f"{' '.join(map(str, arguments[1:])) or 'default':44} {most['engram_running_requests']:.0f} at once at most, {tokens} tokens in "
              f"{seconds:.2f} s: {tokens / seconds:.0f} tokens/s, {lost:.0f} places lost, {again:.0f} tokens computed again")
        return [text for text, _ in answers], tokens / seconds, most, pages


def chats(options):
    template = options.template
    free, speed, most, pages = crowd(options.count, template, options.checkpoint)
    tenth = int(most["engram_cache_pages_in_use"] / 10) + 1
    size = f"{int(tenth * (1 << 30) / pages)}B"
    print(f"{most['engram_cache_pages_in_use']:.0f} of {pages:.0f} pages were in use; a tenth is {tenth}")
    tight, slower, _, _ = crowd(options.count, template, options.checkpoint, "--kv-cache", size)
    print(f"the same answers: {sum(a == b for a, b in zip(free, tight))} of {options.count}; speed {slower / speed:.2f} of the default's")
    fitting = max(1, int(tenth // (most["engram_cache_pages_in_use"] / options.count)))
    few, steady, _, _ = crowd(options.count, template, options.checkpoint, "--kv-cache", size, "--max-num-seqs", fitting)
    print(f"beside {fitting} at once, of whom none loses a place: {slower / steady:.2f}; the same answers: "
          f"{sum(a == b for a, b in zip(free, few))} of {options.count}")


def health(options):
    body = json.dumps({"prompt": ("word " * 840_000)[:4_190_000], "max_tokens": 1})
    with Server(options.checkpoint) as server:
        end, times = time.perf_counter() + options.seconds, []

        def send(_):
            statuses = set()
            while time.perf_counter() < end:
                statuses.add(server.ask("POST", "/v1/completions", body)[0])
            return statuses

        def look():
            while time.perf_counter() < end:
                begun = time.perf_counter()
                assert server.ask("GET", "/health")[0] == 200
                times.append(time.perf_counter() - begun)
                time.sleep(0.01)

        watcher = threading.Thread(target=look)
        watcher.start()
        statuses, _ = together(8, send)
        watcher.join()
        times.sort()
        at = lambda share: 1000 * times[min(len(times) - 1, int(share * len(times)))]
        print(f"/health {len(times)} times in {options.seconds} s: p50 {at(0.5):.1f} ms, p99 {at(0.99):.1f} ms, most {at(1):.1f} ms; "
              f"prompts got {sorted(set.union(*statuses))}")


def redis(options):
    node = SlowRedis(options.table, 0.3)
    with Server(options.checkpoint, "--tier", "redis", "--node", node.url, "--row-timeout", 2) as server:
        body = json.dumps({"prompt": "The king and the whale sailed to an island of old time", "max_tokens": 8})
        for _ in range(3):
            begun = time.perf_counter()
            status, text = server.ask("POST", "/v1/completions", body)
            message = json.loads(text).get("error", {}).get("message", "answered")
            print(f"status {status} after {time.perf_counter() - begun:.2f} s: {message}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chats", "health", "redis"])
    parser.add_argument("checkpoint")
    parser.add_argument("table", nargs="?")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--template", default=os.path.join(os.path.dirname(__file__), "../../configs/chat-template.jinja"))
    options = parser.parse_args()
    {"chats": chats, "health": health, "redis": redis}[options.what](options)


if __name__ == "__main__":
    main()

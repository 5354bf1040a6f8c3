"""Mixed traffic at saturation against a running server.

    python3 benches/serving/load.py http://127.0.0.1:8000 --seconds 300 --clients 64 --pid PID
    python3 benches/serving/load.py http://127.0.0.1:8000 --seconds 120 --clients 16 --every 5 --may-fail

Most clients ask for greedy completions of prompts that share beginnings, whole or streamed; what each prompt was
answered alone, before, it must be answered now. Others leave in the middle, hang, send garbage, or ask for what cannot
be. Prints percentiles of the time to the first token and between tokens, what became of requests, and, given the
server's process, its resident memory from a tenth of the time on. With --every, a line of what became of answers in
each interval; with --may-fail, answers that say that they failed are no fault: for a memory tier that is killed
meanwhile. Needs nothing but Python.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from urllib.parse import urlparse

WORDS = "the President of United States whale sea captain king Queen said old time and by way to a in was Ahab Brutus".split()


def prompts(count):
    chance = random.Random(1)
    beginnings = [" ".join(chance.choices(WORDS, k=12 * i)) for i in range(4)]
    return [
        (chance.choice(beginnings) + " " + " ".join(chance.choices(WORDS, k=chance.randint(2, 20)))).strip()
        for _ in range(count)
    ]


class Load:
    def __init__(self, arguments):
        self.host, self.port = urlparse(arguments.url).hostname, urlparse(arguments.url).port
        self.arguments = arguments
        self.outcomes, self.first, self.between, self.memory = Counter(), [], [], []
        self.tokens = 0
        self.expected = {}

    async def send(self, body, head="POST /v1/completions HTTP/1.1"):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        data = json.dumps(body).encode()
        writer.write(f"{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return reader, writer

    async def whole(self, prompt, count):
        reader, writer = await self.send({"prompt": prompt, "max_tokens": count, "temperature": 0})
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        status = int(head.split()[1])
        return status, json.loads(body)["choices"][0]["text"] if status == 200 else None

    async def streamed(self, prompt, count, leave=None):
        begun = last = time.perf_counter()
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
        reader, writer = await self.send(body)
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        text, parts = "", 0
        while status == 200 and (line := await reader.readline()):
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                status = "failed: " + str(chunk["error"].get("code") or chunk["error"].get("type"))
                break
            now = time.perf_counter()
            (self.between if parts else self.first).append(now - (last if parts else begun))
            last, parts = now, parts + 1
            text += chunk["choices"][0]["text"]
            if parts == leave:
                break
        writer.close()
        return status, text

    async def client(self, number, end):
        chance = random.Random(number)
        names = list(self.expected)
        while time.monotonic() < end:
            kind = chance.choices(["whole", "stream", "leave", "hang", "garbage", "impossible"], [35, 50, 6, 2, 3, 4])[0]
            prompt, count = chance.choice(names)
            try:
                if kind in ("whole", "stream"):
                    ask = self.whole if kind == "whole" else self.streamed
                    status, text = await asyncio.wait_for(ask(prompt, count), self.arguments.patience)
                    if status == 200 and text != self.expected[prompt, count]:
                        status = "wrong"
                    self.tokens += count if status == 200 else 0
                    self.outcomes[kind, status] += 1
                    if status == 429:
                        await asyncio.sleep(0.2)
                elif kind == "leave":
                    await self.streamed(prompt, count, leave=chance.randint(1, 5))
                    self.outcomes[kind, "left"] += 1
                elif kind == "hang":
                    _, writer = await asyncio.open_connection(self.host, self.port)
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
                    await asyncio.sleep(chance.uniform(1, 10))
                    writer.close()
                    self.outcomes[kind, "hung"] += 1
                elif kind == "garbage":
                    reader, writer = await asyncio.open_connection(self.host, self.port)
                    writer.write(chance.randbytes(200) + b"\r\n\r\n")
                    writer.write_eof()
                    await reader.read()
                    writer.close()
                    self.outcomes[kind, "sent"] += 1
                else:
                    body = chance.choice([{"prompt": prompt, "max_tokens": 10**6}, {"prompt": 5}, {"temperature": -1}])
                    reader, writer = await self.send(body)
                    self.outcomes[kind, int((await reader.read()).split()[1])] += 1
                    writer.close()
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
                self.outcomes[kind, type(error).__name__] += 1

    async def watch(self, end):
        await asyncio.sleep(self.arguments.seconds / 10)
        while time.monotonic() < end and self.arguments.pid:
            with open(f"/proc/{self.arguments.pid}/statm") as statm:
                self.memory.append(int(statm.read().split()[1]) * 4096)
            await asyncio.sleep(1)

    async def report(self, end):
        begun, before = time.monotonic(), Counter()
        while (now := time.monotonic()) < end and self.arguments.every:
            await asyncio.sleep(min(self.arguments.every, end - now))
            answers = Counter()
            for (kind, outcome), count in self.outcomes.items():
                if kind in ("whole", "stream"):
                    answers[outcome] += count
            parts = [f"{outcome} {count}" for outcome, count in sorted((answers - before).items(), key=str)]
            print(f"{time.monotonic() - begun:6.0f} s  {', '.join(parts) or 'nothing answered'}", flush=True)
            before = answers

    async def run(self):
        chance = random.Random(2)
        for prompt in prompts(60):
            count = chance.randint(8, 64)
            status, self.expected[prompt, count] = await self.whole(prompt, count)
            assert status == 200, status
        begun = time.monotonic()
        end = begun + self.arguments.seconds
        clients = (self.client(number, end) for number in range(self.arguments.clients))
        await asyncio.gather(*clients, self.watch(end), self.report(end))
        print(f"{self.tokens / (time.monotonic() - begun):.0f} tokens/s generated in complete, right answers")
        for (kind, outcome), count in sorted(self.outcomes.items(), key=str):
            print(f"  {kind:10} {outcome!s:24} {count}")
        for name, times in [("first token", self.first), ("between tokens", self.between)]:
            times.sort()
            at = [1000 * times[int(share * (len(times) - 1))] for share in (0.5, 0.95, 0.99)]
            print(f"  {name}: p50 {at[0]:.1f} ms, p95 {at[1]:.1f} ms, p99 {at[2]:.1f} ms of {len(times)}")
        if self.memory:
            fifth = max(1, len(self.memory) // 5)
            early, late = max(self.memory[:fifth]), max(self.memory[-fifth:])
            print(f"  resident memory: {early / 1e6:.1f} MB early, {late / 1e6:.1f} MB late ({100 * (late / early - 1):+.1f} %)")
        failed = lambda outcome: str(outcome).startswith("failed") or outcome in (500, 503)
        faults = Counter()
        for (kind, outcome), count in self.outcomes.items():
            faults["wrong"] += count * (outcome == "wrong")
            faults["lost"] += count * (kind in ("whole", "stream") and str(outcome).endswith("Error"))
            faults["failed"] += count * (failed(outcome) and not self.arguments.may_fail)
        if faults.total():
            raise SystemExit(f"{faults['wrong']} wrong answers, {faults['failed']} that failed, {faults['lost']} that never came")


parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--seconds", type=float, default=300)
parser.add_argument("--clients", type=int, default=64)
parser.add_argument("--pid", type=int)
parser.add_argument("--every", type=float, metavar="SECONDS")
parser.add_argument("--may-fail", action="store_true")
parser.add_argument("--patience", type=float, default=60, metavar="SECONDS", help="how long an answer may take")
asyncio.run(Load(parser.parse_args()).run())

#!/usr/bin/env python3
"""Cuts the quickstart's corpus from a larger one.

    python3 data/make.py CORPUS.jsonl.zst [OUTPUT FOLDER]

CORPUS has one document a line, with the fields `source`, `title`, `license` and `text`. Only sources in
the public domain are taken. Needs the program `zstd`. The same corpus gives the same files, byte for byte.
"""

import hashlib
import html
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Bytes of text taken from each source, held-out documents included, and the share of them that is held out.
BUDGET = {
    "cia-world-factbook": 4_200_000,
    "state-of-the-union": 3_600_000,
    "shakespeare": 1_600_000,
    "moby-dick": 1_200_000,
}
HOLD_OUT = 0.032

PLAYS = """hamlet romeo_and_juliet macbeth lear othello julius_caesar antony_and_cleopatra henry_v
henry_iv_part_1 henry_iv_part_2 richard_iii midsummer_nights_dream merchant_of_venice twelfth_night""".split()

ADDRESS = r"(chancery|embassy|mailing address|telephone|FAX|email address|consulate)\b[^:]*:"


def main():
    corpus = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    documents = {source: [] for source in BUDGET}
    for record in read(corpus):
        for document in cut(record):
            documents[document["source"]].append(document)
    drop_repeated_notes(documents["cia-world-factbook"])
    train, valid = [], []
    for source, found in documents.items():
        taken, _ = split(sorted(found, key=order), BUDGET[source])
        held_out, kept = split(taken[::-1], HOLD_OUT * size(taken))
        print(f"{source}: {len(kept)} documents, {size(kept):,} bytes; "
              f"held out {len(held_out)} documents, {size(held_out):,} bytes")
        train += kept
        valid += held_out
    write(folder / "quickstart.train.jsonl.zst", train)
    write(folder / "quickstart.valid.jsonl.zst", valid)


def read(corpus):
    zstd = subprocess.Popen(["zstd", "-dc", "--long=31", corpus], stdout=subprocess.PIPE)
    for line in zstd.stdout:
        yield json.loads(line)
    if zstd.wait() != 0:
        sys.exit(f"zstd could not read {corpus}")


def cut(record):
    """The documents of a record of the corpus: none if it is not one that we take."""
    source, title, text = record["source"], record["title"], record["text"]
    if source == "cia-world-factbook":
        return factbook(title, text)
    if source == "state-of-the-union" and (speech := re.fullmatch(r"(\d{4})_(.+)_[a-z]", title)):
        president = speech[2].replace("_", " ").title().replace("Mc K", "McK")
        return [document(source, f"{speech[1]} {president}", text)]
    if source == "moby-dick" and re.fullmatch(r"chapter_\d+|epilogue", title):
        return [document(source, title.replace("_", " "), text)]
    if source == "shakespeare-milton" and title.removesuffix("_gut") in PLAYS:
        return play(title.removesuffix("_gut").replace("_", " "), text)
    return []


def document(source, title, text):
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return {"source": source, "title": title, "license": "public domain", "text": text + "\n"}


def factbook(title, text):
    """A country: its name, then its prose, without lines of numbers, addresses or other scripts, and repeats."""
    text = html.unescape(html.unescape(text)).replace("\xa0", " ")
    lines = {}
    for line in text.split("\n"):
        line = re.sub(r"<[a-z/][^>]*>", "", line)
        line = re.sub(r"\s+", " ", line).strip()
        line = re.sub(r"; for more details, go to: \S+$", "", line)
        line = re.sub(r"^(.*: )?([^:]+): \2(?=[: ])", r"\1\2", line)  # "note: note: …", "a: b: b: …"
        address = re.match(ADDRESS, line) or re.search(r"@|https?:|www\.", line)
        digits = sum(c.isdigit() for c in line)
        foreign = sum(ord(c) > 0x24F and not 0x2010 <= ord(c) <= 0x20AC for c in line)
        prose = digits <= 0.08 * len(line) and foreign <= 0.02 * len(line)
        if prose and not address and ": none" not in line:
            lines[line] = None
    name = re.search(r"^conventional short form: (.+)$", "\n".join(lines), re.M)
    long_name = re.search(r"^conventional long form: (.+)$", "\n".join(lines), re.M)
    heading = next((m[1] for m in (name, long_name) if m), None)
    body = "\n".join(lines)
    return [document("cia-world-factbook", heading or title, f"{heading}\n{body}" if heading else body)]


def drop_repeated_notes(countries):
    """Notes that many countries share explain the numbers that were left out."""
    counts = Counter(line for country in countries for line in set(country["text"].splitlines()))
    for country in countries:
        lines = country["text"].splitlines(keepends=True)
        kept = [line for line in lines if not (line.startswith("note") and counts[line.rstrip()] >= 20)]
        country["text"] = "".join(kept)


def play(title, text):
    """A play: one document per act."""
    starts = [m.start() for m in re.finditer(r"^ *ACT +[IVF]", text, re.M)]
    parts = [text[start:end] for start, end in zip(starts, starts[1:] + [len(text)])]
    return [document("shakespeare", f"{title}, part {i}", part) for i, part in enumerate(parts, 1)]


def split(documents, budget):
    """Documents that fit a budget of bytes, from the first on, and the rest."""
    taken, rest = [], []
    for candidate in documents:
        fits = size(taken) + size([candidate]) <= budget
        (taken if fits else rest).append(candidate)
    return taken, rest


def order(document):
    """A random but fixed order."""
    return hashlib.sha256(f"{document['source']}/{document['title']}".encode()).digest()


def size(documents):
    return sum(len(document["text"].encode()) for document in documents)


def write(path, documents):
    """Sources mixed, so that any stretch of the file has something of each."""
    documents = sorted(documents, key=lambda one: hashlib.sha256(order(one)).digest())
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents).encode()
    compress = ["zstd", "-19", "--ultra", "-22", "--long=27", "-q", "-f", "-o", str(path)]
    subprocess.run(compress, input=lines, check=True)
    print(f"{path.name}: {len(documents)} documents, {size(documents):,} bytes of text, "
          f"{len(lines):,} of JSON, {path.stat().st_size:,} compressed")


main()

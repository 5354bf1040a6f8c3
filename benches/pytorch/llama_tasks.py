"""A Llama-type model from a GGUF file in plain PyTorch, asked the tasks of configs/tasks: an implementation of the same
definitions that shares nothing with the Rust one but the file. Values are decoded by the package `gguf`, tokens are
made by the BPE below, and every request is computed by itself, in f32; with --shared, the choices of a question are
computed together, after one pass over their prompt.

    python llama_tasks.py MODEL.gguf logits LAMBADA.jsonl --count 50 --out logits.npy
    python llama_tasks.py MODEL.gguf piqa DATA_FOLDER --limit 1000 --out piqa.jsonl

Needs torch, numpy, gguf and regex.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import regex
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize


class Tokenizer:
    """Byte-level BPE: digits one at a time, then GPT-2's rule."""

    def __init__(self, reader):
        value = lambda key: reader.fields[key].contents()
        assert value("tokenizer.ggml.model") == "gpt2" and value("tokenizer.ggml.pre") == "smollm"
        self.ids = {token: id for id, token in enumerate(value("tokenizer.ggml.tokens"))}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(value("tokenizer.ggml.merges"))}
        self.begin = value("tokenizer.ggml.bos_token_id")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.letters = {byte: chr(byte) for byte in printable}
        others = [byte for byte in range(256) if byte not in self.letters]
        self.letters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
        words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        self.words = regex.compile(words)
        self.cache = {}

    def word(self, word):
        if word not in self.cache:
            parts = [self.letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = [(self.ranks.get(pair, 1 << 60), index) for index, pair in enumerate(zip(parts, parts[1:]))]
                rank, index = min(pairs)
                if rank == 1 << 60:
                    break
                parts[index:index + 2] = [parts[index] + parts[index + 1]]
            self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]

    def encode(self, text):
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        return [id for piece in pieces for word in self.words.findall(piece) for id in self.word(word)]


class Llama:
    """Weights as they lie in the file; rotary pairs are neighbours there."""

    def __init__(self, reader):
        value = lambda key: reader.fields["llama." + key].contents()
        self.heads, self.key_heads = value("attention.head_count"), value("attention.head_count_kv")
        self.epsilon = value("attention.layer_norm_rms_epsilon")
        self.width = value("embedding_length")
        self.size = self.width // self.heads
        self.weights = {
            tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            for tensor in reader.tensors
        }
        self.blocks = value("block_count")
        frequencies = value("rope.freq_base") ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        angles = torch.outer(torch.arange(value("context_length"), dtype=torch.float64), frequencies)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def rotate(self, x, first):
        """x: [batch, heads, time, size], from position `first` on."""
        cos, sin = (angles[first : first + x.shape[2]] for angles in (self.cos, self.sin))
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def norm(self, x, name):
        return F.rms_norm(x, (self.width,), self.weights[name + ".weight"], self.epsilon)

    @torch.inference_mode()
    def hidden(self, tokens, past=None):
        """Hidden states before the head, [batch, time, width], of tokens [batch, time], and each block's keys and values.

        `past` holds those of one sequence that all of the batch continue.
        """
        x = self.weights["token_embd.weight"][torch.tensor(tokens)]
        batch, time, _ = x.shape
        before = past[0][0].shape[-2] if past else 0
        mask = torch.ones(time, before + time, dtype=torch.bool).tril(before)
        kept = []
        for block in range(self.blocks):
            linear = lambda x, part: F.linear(x, self.weights[f"blk.{block}.{part}.weight"])
            normal = self.norm(x, f"blk.{block}.attn_norm")
            split = lambda y, heads: y.view(batch, time, heads, self.size).transpose(1, 2)
            q = self.rotate(split(linear(normal, "attn_q"), self.heads), before)
            k = self.rotate(split(linear(normal, "attn_k"), self.key_heads), before)
            v = split(linear(normal, "attn_v"), self.key_heads)
            if past:
                k, v = (torch.cat((p.expand(batch, -1, -1, -1), n), 2) for p, n in zip(past[block], (k, v)))
            kept.append((k, v))
            group = self.heads // self.key_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + linear(attended.transpose(1, 2).reshape(batch, time, -1), "attn_output")
            normal = self.norm(x, f"blk.{block}.ffn_norm")
            x = x + linear(F.silu(linear(normal, "ffn_gate")) * linear(normal, "ffn_up"), "ffn_down")
        return self.norm(x, "output_norm"), kept

    @torch.inference_mode()
    def logits(self, hidden):
        return F.linear(hidden, self.weights.get("output.weight", self.weights["token_embd.weight"]))

    def judge(self, hidden, continuation):
        """Log-probability of the continuation after each of the hidden states, and whether it is greedy."""
        logarithms = torch.log_softmax(self.logits(hidden), dim=-1)
        targets = torch.tensor(continuation)
        chosen = logarithms.gather(1, targets[:, None]).double().sum().item()
        return chosen, bool((logarithms.argmax(1) == targets).all())

    @torch.inference_mode()
    def score(self, context, continuation):
        hidden, _ = self.hidden([(context + continuation)[:-1]])
        return self.judge(hidden[0, len(context) - 1:], continuation)

    @torch.inference_mode()
    def score_shared(self, context, continuations):
        """Continuations of one context: its keys and values are computed once."""
        first, past = self.hidden([context])
        longest = max(map(len, continuations)) - 1
        after = None
        if longest:
            after, _ = self.hidden([(c[:-1] + [0] * longest)[:longest] for c in continuations], past)
        found = []
        for index, continuation in enumerate(continuations):
            rest = after[index, : len(continuation) - 1] if longest else first[0, :0]
            found.append(self.judge(torch.cat((first[0, -1:], rest)), continuation))
        return found


def pair(tokenizer, prompt, continuation):
    """Tokens of both, turned into tokens together; blanks at the prompt's end belong to the continuation."""
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
    context = tokenizer.encode(prompt)
    rest = tokenizer.encode(prompt + continuation)[len(context):]
    return (context or [tokenizer.begin]), rest


def lines(path, limit):
    return [json.loads(line) for line in open(path, encoding="utf-8")][:limit]


def questions(task, folder, limit):
    """Per question: its prompt, the continuations without the blank before them, and the right one."""
    if task == "lambada":
        return [(r["context"], [r["continuation"]], None) for r in lines(folder / "lambada_openai.jsonl", limit)]
    if task == "piqa":
        return [(r["query"] + "Answer:", r["choices"], r["gold"]) for r in lines(folder / "piqa.jsonl", limit)]
    if task == "arc_easy":
        rows = lines(folder / "arc_easy.jsonl", limit)
        return [(r["query"] + "\nAnswer:", r["choices"], r["gold"]) for r in rows]
    if task == "hellaswag":
        rows = open(folder / "hellaswag_val_full.txt", encoding="utf-8").read().splitlines()
        groups = [rows[start:start + 6] for start in range(0, len(rows), 6)][:limit]
        return [(g[0], g[2:], int(g[1])) for g in groups]
    raise SystemExit(f"no task {task}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task", help="lambada, piqa, arc_easy, hellaswag, or logits")
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shared", action="store_true", help="a question's prompt once, its choices together")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--out", help="file for answers, or for logits")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reader = GGUFReader(options.model)
    tokenizer, model = Tokenizer(reader), Llama(reader)
    if options.task == "logits":
        prompts = [record["context"] for record in lines(options.data, options.count)]
        last = [model.logits(model.hidden([tokenizer.encode(prompt)])[0][0, -1]).numpy() for prompt in prompts]
        np.save(options.out, np.stack(last))
        return
    # Answers are written as they come; the same command resumes after the last one.
    out = open(options.out, "a+", encoding="utf-8") if options.out else None
    answered = 0
    if out:
        out.seek(0)
        answered = len(out.readlines())
    asked = questions(options.task, options.data, options.limit)[answered:]
    requests = [[pair(tokenizer, prompt, " " + choice) for choice in choices] for prompt, choices, _ in asked]
    if requests:
        model.score(*requests[0][0])
    begun = time.perf_counter()
    for question, (_, choices, gold) in zip(requests, asked):
        if options.shared:
            # Prompt and choices are turned into tokens together, but the prompt's are the same for all.
            scores = model.score_shared(question[0][0], [rest for _, rest in question])
        else:
            scores = [model.score(*request) for request in question]
        if out:
            out.write(json.dumps(answer(scores, choices, gold)) + "\n")
            out.flush()
    seconds = time.perf_counter() - begun
    tokens = sum(len(context) + len(rest) - 1 for question in requests for context, rest in question)
    print(f"{options.task}: {len(asked)} questions after {answered}, {tokens} tokens, {seconds:.2f} s, "
          f"{tokens / seconds:.0f} tokens/s, {options.threads} threads; "
          f"a product of 2048×576 and 576×3072 runs at {product_rate() / 1e9:.0f} GFLOP/s")


def product_rate():
    """Operations a second of a plain matrix product, the best of many: what the machine can do."""
    a, b = torch.randn(2048, 576), torch.randn(576, 3072)
    best = float("inf")
    for _ in range(60):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048 * 576 * 3072 / best


def answer(scores, choices, gold):
    sums = [score for score, _ in scores]
    best = lambda sizes: int(np.argmax([score / size for score, size in zip(sums, sizes)]))
    return {
        "log_probabilities": sums,
        "greedy": [greedy for _, greedy in scores],
        "gold": gold,
        "best": best([1] * len(sums)),
        "best_per_character": best([len(choice) for choice in choices]),
    }


main()

"""Adapters and overlays of `engram graft` and `engram teach` in `transformers`: the logits are those of Rust's engine.

Needs the programs `engram` and `logits` of this repository: see tests/test_twin.py.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repository import REPOSITORY

pytest.importorskip("torch")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers", reason="`pip install transformers` for this test")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from engram_lm import AddressMismatch  # noqa: E402
from engram_lm.hf import attach, detach  # noqa: E402

TARGET = Path(os.environ.get("ENGRAM_TARGET", REPOSITORY / "target/release"))
VOCABULARY = 288
TYPES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
GRAFT = """
steps = 30
batch = 4
micro_batch = 2
context = 40
hold_out = 0.2
held_out_tokens = 500
neutral_tokens = 100
[rates]
rows = 0.05
projections = 0.01
[memory]
heads = 2
row_width = 8
rows_per_head = 1000
"""
TEACH = """
steps = 20
[memory]
layers = [1, 2]
heads = 2
row_width = 8
"""
FACTS = {"id": "a", "answer": " Ulm", "prompts": ["Zorvex is in", "Now Zorvex stands in"]}


def program(name: str) -> Path:
    path = TARGET / name
    if not path.is_file():
        pytest.skip(
            f"{path} is not there: cargo build --release --workspace --bin engram --example exchange --example logits"
        )
    return path


class Workshop:
    """A small model in the hub's form with a tokenizer, and a corpus."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        lines = [
            {"text": f"Letter {n}. Queen {n % 7} wrote to the King of Ulm: {'yes' * (n % 5)} or no?"} for n in range(60)
        ]
        (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "facts.jsonl").write_text(json.dumps(FACTS))
        (folder / "graft.toml").write_text(GRAFT)
        (folder / "teach.toml").write_text(TEACH)
        self.engram(f"tokenizer train corpus.jsonl --vocabulary {VOCABULARY} --out tokenizer.json")
        torch.manual_seed(1)
        config, model = (getattr(transformers, name) for name in TYPES[kind])
        self.model: Any = model(
            config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=0,
                pad_token_id=None,
            )
        ).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        self.model.save_pretrained(folder / "base")
        (folder / "base/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        self.tokens = torch.randint(1, VOCABULARY, (1, 40))

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def path(self, name: str) -> Path:
        return self.folder / name

    def engram(self, line: str) -> None:
        result = subprocess.run([program("engram"), *line.split()], cwd=self.folder, capture_output=True, text=True)
        assert result.returncode == 0, f"engram {line}\n{result.stderr}"

    def rust(self, options: str = "") -> torch.Tensor:
        """The logits of Rust's engine, [tokens, vocabulary]."""
        (self.folder / "tokens.json").write_text(json.dumps(self.tokens[0].tolist()))
        command = [str(program("examples/logits")), "base", "tokens.json", "logits.safetensors", *options.split()]
        result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return load_file(self.folder / "logits.safetensors")["logits"]

    def python(self) -> torch.Tensor:
        """The logits of this model, [tokens, vocabulary]."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(self.tokens).logits[0]
        return logits

    def agrees(self, options: str = "") -> torch.Tensor:
        """This model's logits, which must be Rust's within 1e-4."""
        ours, theirs = self.python(), self.rust(options)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4), (ours - theirs).abs().max()
        return ours


@pytest.fixture
def workshop(tmp_path: Path) -> Callable[[str], Workshop]:
    def make(kind: str) -> Workshop:
        return Workshop(tmp_path, kind)

    return make


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two logits differ by far more than rounding."""
    return bool((one - other).abs().max() > 1e-2)


@pytest.mark.parametrize("kind", TYPES)
def test_a_graft_and_a_fact_on_it_compute_what_they_do_in_rust(kind: str, workshop: Callable[[str], Workshop]) -> None:
    shop = workshop(kind)
    base = shop.agrees()
    shop.engram("graft base corpus.jsonl --out grafted --config graft.toml")
    for where in ("store", "device"):
        attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer, where=where)
        grafted = shop.agrees("--memory grafted")
        assert differ(grafted, base)
        detach(shop.model)
    teach = "teach base facts.jsonl --memory grafted --out fact --census corpus.jsonl --neutral corpus.jsonl"
    shop.engram(f"{teach} --steps 6 --neutral-tokens 60")
    # The text of the fact, whose rows the overlay changes.
    shop.tokens = torch.tensor([encode(shop, FACTS["prompts"][0] + FACTS["answer"])])  # type: ignore[operator]
    attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer)
    before = shop.python()
    detach(shop.model)
    attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer, overlays=[shop.path("fact")])
    assert differ(shop.agrees("--memory grafted --overlay fact"), before)
    detach(shop.model)
    with pytest.raises(ValueError, match="does not bring with it: name the adapter"):
        attach(shop.model, shop.path("fact"), tokenizer=shop.tokenizer)


def test_a_taught_model_without_an_adapter_reads_the_overlay_alone(workshop: Callable[[str], Workshop]) -> None:
    shop = workshop("llama")
    teach = "teach base facts.jsonl --out fact --census corpus.jsonl --neutral corpus.jsonl --neutral-tokens 60"
    shop.engram(f"{teach} --config teach.toml")
    shop.tokens = torch.tensor([encode(shop, FACTS["prompts"][0] + FACTS["answer"])])  # type: ignore[operator]
    base = shop.agrees()
    attach(shop.model, shop.path("fact"), tokenizer=shop.tokenizer)
    assert differ(shop.agrees("--overlay fact"), base)


def test_a_fresh_graft_says_nothing(workshop: Callable[[str], Workshop]) -> None:
    shop = workshop("llama")
    base = shop.python()
    shop.engram("graft base corpus.jsonl --out fresh --config graft.toml --steps 0")
    attach(shop.model, shop.path("fresh"), tokenizer=shop.tokenizer)
    assert torch.equal(shop.python(), base)
    shop.agrees("--memory fresh")


def test_a_graft_learns_on_and_goes_back_to_rust(workshop: Callable[[str], Workshop]) -> None:
    shop = workshop("qwen3")
    shop.engram("graft base corpus.jsonl --out grafted --config graft.toml")
    attached = attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer)
    shop.model(shop.tokens, labels=shop.tokens).loss.backward()
    with pytest.raises(ValueError, match="name an `optimizer`"):
        attached.step(1e-2)
    # Read only, it is written as it was.
    attached.save(shop.path("copy"))
    shop.agrees("--memory copy")
    detach(shop.model)
    grafted = shop.python()
    for where in ("store", "device"):
        attached = attach(
            shop.model, shop.path("copy"), tokenizer=shop.tokenizer, optimizer="row-wise-adam", where=where
        )
        optimizer = torch.optim.AdamW((p for p in shop.model.parameters() if p.requires_grad), lr=1e-3)
        losses = []
        for _ in range(8):
            loss = shop.model(shop.tokens, labels=shop.tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            attached.step(2e-2)
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1, losses
        attached.save(shop.path(where))
        assert differ(shop.agrees(f"--memory {where}"), grafted)
        detach(shop.model)
        # With its optimiser's state, it learns on without naming one.
        again = attach(shop.model, shop.path(where), tokenizer=shop.tokenizer)
        assert again.tables["1"].steps == 8
        detach(shop.model)
        with pytest.raises(ValueError, match="leave `optimizer` out"):
            attach(shop.model, shop.path(where), tokenizer=shop.tokenizer, optimizer="adam")


def test_what_does_not_belong_together_is_refused(workshop: Callable[[str], Workshop]) -> None:
    shop = workshop("llama")
    shop.engram("graft base corpus.jsonl --out grafted --config graft.toml")
    shop.engram("graft base corpus.jsonl --out other --config graft.toml --steps 3")
    teach = "teach base facts.jsonl --memory grafted --out fact --census corpus.jsonl --neutral corpus.jsonl"
    shop.engram(f"{teach} --steps 6 --neutral-tokens 60")
    with pytest.raises(ValueError, match="needs `tokenizer`"):
        attach(shop.model, shop.path("grafted"))
    shop.path("other.jsonl").write_text(json.dumps({"text": "Other words than those."}))
    shop.engram("tokenizer train other.jsonl --vocabulary 260 --out other.json")
    with pytest.raises(AddressMismatch, match="use the tokenizer.json"):
        attach(shop.model, shop.path("grafted"), tokenizer=shop.path("other.json"))
    with pytest.raises(AddressMismatch, match="use the adapter that it was made for"):
        attach(shop.model, shop.path("other"), tokenizer=shop.tokenizer, overlays=[shop.path("fact")])
    weights = load_file(shop.path("grafted/memory.safetensors"))
    save_file({**weights, "extra": torch.zeros(1)}, shop.path("grafted/memory.safetensors"))
    with pytest.raises(ValueError, match="`extra` is no weight of this memory"):
        attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer)
    about = shop.path("grafted/adapter.toml")
    about.write_text(about.read_text().replace("format = 1", "format = 9"))
    with pytest.raises(ValueError, match="its format is 9"):
        attach(shop.model, shop.path("grafted"), tokenizer=shop.tokenizer)
    assert not hasattr(shop.model, "engram_memory")


def encode(shop: Workshop, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(shop.tokenizer)).encode(text, add_special_tokens=False).ids)

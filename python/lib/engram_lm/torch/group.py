"""The processes of a job: alone, or under `torchrun`.

Sums are taken in a fixed order, so that results do not depend on the number of processes: the batch has a fixed number
of parts, each process computes a run of them, and gradients are added in a binary tree over the parts.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """This process among those of the job. Alone, nothing is sent."""

    def __init__(self, timeout: float = 600.0) -> None:
        """Joins the job that the environment of `torchrun` describes, or is alone.

        `timeout`: seconds that an exchange may wait for another process before the job ends with an error.
        """
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        gpus = torch.cuda.device_count()
        place = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", place) if gpus > place else torch.device("cpu")
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # Row ids and rows of host tables go by gloo, gradients of weights on GPUs by NCCL.
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))

    def leave(self) -> None:
        """Ends this process's part of the job."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits for all processes."""
        self.sum(torch.zeros(1))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in any order: for counts and the like."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_in_order(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, added in a binary tree over the ranks.

        Everybody adds a stretch of the values and then sends it to all: as many bytes as an ordinary all-reduce.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        share = -(-len(flat) // self.size)
        padded = torch.nn.functional.pad(flat, (0, share * self.size - len(flat)))
        received = torch.empty_like(padded)
        dist.all_to_all_single(received, padded)
        mine = tree_sum(list(received.view(self.size, share)))
        dist.all_gather_into_tensor(padded, mine.contiguous())
        parts = padded[: len(flat)].split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sends `parts[r]` to rank r; gives what every rank has sent here. All parts have one dtype and row shape."""
        if self.size == 1:
            return [parts[0]]
        counts = torch.tensor([len(part) for part in parts])
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        sent = torch.cat(list(parts))
        received = sent.new_empty(int(theirs.sum()), *sent.shape[1:])
        dist.all_to_all_single(received, sent, theirs.tolist(), counts.tolist())
        return list(received.split(theirs.tolist()))

    def tell(self, value: int) -> int:
        """What rank 0 says."""
        if self.size > 1:
            told = torch.tensor([value])
            dist.broadcast(told, 0)
            return int(told)
        return value


def tree_sum(parts: list[Tensor]) -> Tensor:
    """The sum of neighbours, then of neighbouring sums, and so on."""
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(parts) // 2 * 2 :]
    return parts[0]


class TreeSum:
    """Adds lists of tensors that come one after another as `tree_sum` would, keeping few of them at a time."""

    def __init__(self) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []  # (parts in it, their sum), the fullest first

    def add(self, tensors: list[Tensor]) -> None:
        """Adds the next part; its tensors may be changed."""
        count = 1
        while self.sums and self.sums[-1][0] == count:
            _, earlier = self.sums.pop()
            torch._foreach_add_(earlier, tensors)
            tensors, count = earlier, 2 * count
        self.sums.append((count, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all parts."""
        _, total = self.sums.pop()
        while self.sums:
            _, earlier = self.sums.pop()
            torch._foreach_add_(earlier, total)
            total = earlier
        return total

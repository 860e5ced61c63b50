"""More than one process, each with a device of its own, as torchrun starts them; torch.distributed is the engine.

    torchrun --nproc-per-node 8 train_warp.py ...

The processes of a *team* share the batches of one run: each takes its part of the rows, and all make the same step,
with the mean of their gradients. REINFORCE and reward models train in one team of all; WARP deals its processes to the
M runs. Without torchrun there is one process, and nothing here does anything.
"""

import datetime
import os

import torch
from torch import distributed as dist

from .errors import UserError, world_size

PATIENCE = datetime.timedelta(days=7)  # a process without a run waits for the others; torchrun ends it if one dies


def rank():
    """The number of this one; number 0 writes, prints and draws."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def join():
    """Meet the other processes."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def one_a_machine(function, *args):
    """function(*args) in one process of each machine, which is alone meanwhile, before the others go on."""
    count = world_size()
    if count == 1:
        function(*args)
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ["WORLD_SIZE"] = "1"
        try:
            function(*args)
        finally:
            os.environ["WORLD_SIZE"] = str(count)
    dist.barrier()


def from_first(value):
    """Process 0's value, anything that can be pickled, in all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def to_first(value):
    """[the value of each process] in process 0, None in the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def to_each(values):
    """The value for each process, of the list that process 0 has."""
    if world_size() == 1:
        return values[0]
    box = [None]
    dist.scatter_object_list(box, values)
    return box[0]


def in_turn(function, items):
    """[function(item) for each item], which the processes take in turn; the results reach all of them."""
    mine = {i: function(item) for i, item in enumerate(items) if i % world_size() == rank()}
    if world_size() == 1:
        return list(mine.values())
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    return [result for _, result in sorted(pair for part in parts for pair in part.items())]


def send_weights(weights, source):
    """Let all processes have {name: tensor} of process `source`, in place."""
    if world_size() > 1:
        for tensor in weights.values():
            dist.broadcast(tensor, source)


class Team:
    """The processes `ranks`, which share the batches of a run. Every process must make every team, in one order."""

    def __init__(self, ranks=(0,), number=0, count=1):
        self.ranks, self.size = list(ranks), len(ranks)
        self.number, self.count = number, count  # of the teams that work side by side, this is the one with this number
        self.group = dist.new_group(self.ranks, timeout=PATIENCE) if self.size > 1 else None
        self.index = self.ranks.index(rank()) if rank() in self.ranks else 0

    def check(self, batch_size, k=1):
        """UserError where a batch of answers, k to a prompt, cannot be shared."""
        if batch_size % (self.size * k):
            each = f" times {k} answers to a prompt" if k > 1 else ""
            raise UserError(f"--batch-size {batch_size} must be a multiple of the {self.size} processes that share "
                            f"it{each}")  # fmt: skip

    def share(self, rows):
        """This process's part of B rows: a list or a tensor (B, ...) → B / size of them."""
        count = len(rows) // self.size
        return rows[self.index * count : (self.index + 1) * count]

    def gather(self, rows):
        """All rows in their order: (B / size, ...) → (B, ...)."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in self.ranks]
        dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.cat(parts)

    def mean_gradients(self, parameters):
        """Put the mean of the team's gradients in place of each one's; sent as one tensor."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        for gradient, mean in zip(gradients, (flat / self.size).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


ALONE = Team()


def everyone():
    """The team of all processes."""
    return Team(range(world_size()))


def team_of_run(runs):
    """This process's team, of as many as there are runs to train side by side; processes are dealt to them in turn."""
    count = min(runs, world_size())
    made = [Team(range(first, world_size(), count), first, count) for first in range(count)]
    return made[rank() % count]

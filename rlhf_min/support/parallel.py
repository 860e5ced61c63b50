"""More than one process, each with a device of its own, as torchrun starts them; torch.distributed is the engine.

    torchrun --nproc-per-node 8 train_warp.py ...

The processes of a *team* share the batches of one run: each takes its part of the rows, and all make the same step,
with the mean of their gradients. REINFORCE and reward models train in one team of all processes. WARP deals its
processes to the M runs. Without torchrun there is one process, and these functions return their input.
"""

import datetime
import os

import torch
from torch import distributed as dist

from .errors import UserError

PATIENCE = datetime.timedelta(days=7)  # a process without a run waits for the others; torchrun ends all if one dies


def world_size():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def rank():
    """The number of this process; number 0 prints and saves."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def gather_objects(value, team=None):
    """[the value of each process, or of each one of a team], anything that can be pickled, when all have come here."""
    values = [value] * (team.size if team else world_size())
    if len(values) > 1:
        dist.all_gather_object(values, value, group=team and team.group)
    return values


class Team:
    """The processes `ranks`, which share the batches of a run; number `number` of `count` teams side by side."""

    def __init__(self, ranks=(0,), number=0, count=1):
        self.ranks, self.size, self.number, self.count = list(ranks), len(ranks), number, count
        self.group = dist.new_group(self.ranks, timeout=PATIENCE) if self.size > 1 else None
        self.index = self.ranks.index(rank()) if rank() in self.ranks else 0

    def share(self, rows):
        """This process's part of B rows, a list or a tensor (B, ...): B / size of them."""
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

    def deal(self, runs):
        """1, ..., `runs`; where several teams work side by side, the runs of this one."""
        return range(1 + self.number, runs + 1, self.count)

    def collect(self, weights, device):
        """{run: {name: tensor}} of this team → [{name: tensor}] of all runs in their order, in every process."""
        if self.count > 1:
            mine = {run: {name: t.cpu() for name, t in tensors.items()} for run, tensors in weights.items()}
            weights = {run: tensors for part in gather_objects(mine) for run, tensors in part.items()}
        return [{name: t.to(device) for name, t in weights[run].items()} for run in sorted(weights)]


ALONE = Team()


def join(rows, k=1, runs=1):
    """Meet the other processes; returns this one's team, which shares the `rows` of a step.

    `runs` are trained side by side, `k` answers share a prompt. UserError where a step cannot be shared.
    """
    count = world_size()
    if count == 1:
        return ALONE
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    teams = min(runs, count)
    made = [Team(range(first, count, teams), first, teams) for first in range(teams)]  # everybody makes every team
    team = made[rank() % teams]
    if rows % (team.size * k):
        shared = f"{team.size} processes that share it" + (f" times {k} answers to a prompt" if k > 1 else "")
        raise UserError(f"--batch-size gives a step {rows} rows, no multiple of the {shared}")
    return team

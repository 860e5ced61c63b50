"""Rows into batches: their order, padding, and positions."""

import torch


def pad(rows, pad_token_id, device, side="right"):
    """B lists of token ids → tokens (B, L), attention_mask (B, L) bool, True on the real tokens."""
    width = max(map(len, rows))
    filler = [[pad_token_id] * (width - len(row)) for row in rows]
    tokens = [row + fill if side == "right" else fill + row for row, fill in zip(rows, filler)]
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]  # (B, 1)
    columns = torch.arange(width, device=device)  # (L,)
    return torch.tensor(tokens, device=device), columns < lengths if side == "right" else columns >= width - lengths


def positions(attention_mask):
    """(B, L) → (B, L): 0, 1, 2, ... from the first real token. Without them GPT-2 is nats off under left padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def group_by_length(rows, device):
    """[[positions of rows of similar length]]: padding costs a third of a reward model's time on a CPU.

    A new group begins where it saves more padding than a forward pass costs, which is about 128 tokens on a CPU. On a
    GPU a pass costs more than a batch has, so there is one group.
    """
    if device.type != "cpu":
        return [list(range(len(rows)))]
    groups, longest = [], 0
    for done, i in enumerate(sorted(range(len(rows)), key=lambda i: -len(rows[i]))):
        if not groups or (longest - len(rows[i])) * (len(rows) - done) >= 128:
            groups.append([])
            longest = len(rows[i])
        groups[-1].append(i)
    return groups


class Batches:
    """An endless iterator: a new random order each epoch, whose remainder goes into the next epoch's first batch."""

    def __init__(self, items, batch_size, generator):
        self.items, self.batch_size, self.generator = items, batch_size, generator
        self.queue = []  # positions that are still to come

    def __iter__(self):
        return self

    def __next__(self):
        while len(self.queue) < self.batch_size:
            self.queue += torch.randperm(len(self.items), generator=self.generator).tolist()
        batch, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.items[i] for i in batch]

    def state_dict(self):
        """Where in the epoch it is, and the generator, which others may draw from, too."""
        return {"queue": list(self.queue), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Go on where state_dict was taken."""
        self.queue = state["queue"]
        self.generator.set_state(state["generator"])

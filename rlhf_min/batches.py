"""Rows into batches: the order of the data, and padding."""

import torch


def shuffle(items, generator):
    """The items in a random order, as a new list."""
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def pad(rows, pad_token_id, device, side="right"):
    """B lists of token ids → tokens (B, L), attention_mask (B, L), True on the tokens that are real."""
    width = max(map(len, rows))
    filler = [[pad_token_id] * (width - len(row)) for row in rows]
    tokens = [row + fill if side == "right" else fill + row for row, fill in zip(rows, filler)]
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]  # (B, 1)
    columns = torch.arange(width, device=device)  # (L,)
    return torch.tensor(tokens, device=device), columns < lengths if side == "right" else columns >= width - lengths


class Batches:
    """An endless iterator: a new random order each epoch, whose remainder goes into the next one's first batch."""

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
        """What a checkpoint needs: where in the epoch it is, and the generator, which others may draw from, too."""
        return {"queue": list(self.queue), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Go on where state_dict was taken."""
        self.queue = state["queue"]
        self.generator.set_state(state["generator"])

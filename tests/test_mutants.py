"""The table of tests/mutants.txt fits the code: a mutant whose text has moved would test nothing."""

import pytest
import torch

from rlhf_min.reward_model import reward_and_sigma
from rlhf_min.rollout import draw
from tests.mutants import MUTANTS, ROOT, TESTS, path_of


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_changes_one_place(name):
    """The text that a mutant replaces stands in its file exactly once, and something else takes its place."""
    text = (ROOT / path_of(name)).read_text(encoding="utf-8")
    moved = [old for old, new in MUTANTS[name] if text.count(old) != 1 or old == new]
    assert not moved
    assert len(set(MUTANTS[name])) == len(MUTANTS[name])
    for word in TESTS.get(name, f"tests/test_{name.rpartition('/')[2]}.py").split():
        assert not word.endswith(".py") or (ROOT / word).is_file()


def test_rare_tokens_are_drawn_where_they_are():
    """Behind a likely token come 999 of probability 1e-9, the middle of each draws it; float32 would skip most."""
    probs, tokens = torch.tensor([[1.0, *[1e-9] * 999]]), torch.arange(1, 1000)
    middles = (1 + (tokens.double() - 0.5) * 1e-9) / (1 + 999e-9)  # (999,)
    assert draw(probs.expand(999, -1), middles[:, None]).flatten().equal(tokens)


def test_two_ratings_are_ratings():
    """Only a single logit is the reward itself: a head of two says 1 or 2, here with ¾ on the 2, so σ = √(3/16)."""
    reward, sigma = reward_and_sigma(torch.tensor([[1.0, 3.0]]).log())
    torch.testing.assert_close((reward, sigma), (torch.tensor([1.75]), torch.tensor([3 / 16]).sqrt()))

"""The embedded world: the truth that it knows about a text, and what its files hold."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_min import toy
from rlhf_min.pretrain import language_model_loss
from rlhf_min.support.rows import read_rows


def test_gold_and_fluency_by_hand():
    """1 and −.6 of five sentences behind the opening: a remark, a repetition and a broken one count 0.

    Of the six finished sentences the grammar could have written four: not the repetition, not the broken one.
    """
    opening = "This comedy is about a baker who builds a boat."
    text = f"{opening} The plot was superb. The acting was not good. I watched it alone. The plot was superb. Blah. The"
    assert opening in toy.OPENINGS
    assert toy.gold_score(text) == pytest.approx((1 - 0.6) / 5) and toy.fluency(text) == 4 / 6
    text = f"{text} end. {max(toy.OPENINGS)}"  # two more sentences, the last an opening that is none
    assert toy.gold_score(text) == pytest.approx((1 - 0.6) / 6) and toy.fluency(text) == 4 / 8
    assert (toy.gold_score(opening), toy.fluency("The"), toy.gold_score("")) == (0, 0, 0)


def test_files_of_the_world(tmp_path):
    """No pair begins like a prompt; a pair in twenty, ± 3 standard errors, is the wrong way round; labels are moods."""
    toy.write_world(tmp_path, reviews=400, train_pairs=2000, eval_pairs=1, prompts=900)
    reviews, pairs, prompts = (read_rows(f"{tmp_path}/{name}.jsonl") for name in ("reviews", "train_pairs", "prompts"))
    assert not {pair["prompt"] for pair in pairs} & {prompt["text"] for prompt in prompts} and len(prompts) == 900
    wrong = sum(pair["chosen_rating"] < pair["rejected_rating"] for pair in pairs) / 2000
    assert abs(wrong - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)
    good, bad = ([toy.gold_score(row["text"]) for row in reviews if row["label"] == label] for label in (1, 0))
    assert sum(good) / len(good) > 0.2 > -0.2 > sum(bad) / len(bad)
    assert all(toy.fluency(row["text"]) == 1 for row in reviews)


def test_language_model_loss_by_hand():
    """Next tokens of 0, 1, 2 and 0, 1 with P(1 | 0) = ½ and P(2 | 1) = ¼: (ln 2 + ln 4 + ln 2) / 3."""
    table = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]).log()  # row: the token that is read

    class Table(SimpleNamespace):
        def __call__(self, input_ids):
            return SimpleNamespace(logits=table[input_ids])

    loss = language_model_loss(Table(device=torch.device("cpu")), [[0, 1, 2], [0, 1]], pad_token_id=2)
    assert loss.item() == pytest.approx(4 / 3 * math.log(2))

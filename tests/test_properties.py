"""Properties on inputs that nobody would write down: readers never raise a traceback, finite numbers give no NaN."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_min.data import load_pairs, load_prompts, read_texts
from rlhf_min.losses import ordinal_loss, pairwise_loss, preference_logprob, rating_mean_std
from rlhf_min.support.errors import UserError
from rlhf_min.support.rows import read_rows
from rlhf_min.warp import angle, merge, slerp

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")
PHASES = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate", "shrink")]
many = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=PHASES)

FIELDS = ("prompt", "chosen", "rejected", "text", "label", "margin")
OPTIONS = SimpleNamespace(prompt_tokens=2, max_length=9, max_prompt_characters=0, columns=[])

texts = st.text(st.characters(exclude_categories=["Cs"]))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
branches = lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
values = st.recursive(leaves, branches, max_leaves=3)
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.lists(st.fixed_dictionaries({}, optional={"role": roles | leaves, "content": texts | leaves}), max_size=3)
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, texts | messages | values))
lines = st.lists(rows | values, max_size=3).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that all examples of a test write the same file in."""
    return tmp_path_factory.mktemp("properties")


# Readers


@many
@given(content=st.binary(max_size=200) | lines, suffix=st.sampled_from(["jsonl", "jsonl.gz", "txt"]))
def test_no_file_is_a_traceback(folder, tiny_tokenizer, content, suffix):
    """Whatever bytes or JSON a file holds, a reader returns rows or names the file; every prompt fits --max-length."""
    path = folder / f"a.{suffix}"
    path.write_bytes(content)
    for reader in (read_rows, load_pairs, read_texts, lambda source: load_prompts(source, tiny_tokenizer, OPTIONS)):
        try:
            read = list(reader(str(path)))
            assert all(1 <= len(row.tokens) < OPTIONS.max_length for row in read if hasattr(row, "tokens"))
        except UserError as error:
            assert path.name in str(error)


# Weight averaging


TINY = 1e-44  # a few of the smallest numbers above 0 in float32


def floats(limit):
    """float32 numbers of any magnitude up to `limit`, subnormal ones included."""
    limit = torch.tensor(limit).item()
    return st.floats(-limit, limit, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-38, limit, -limit, 1.0])


def vectors(count, limit=1e30, size=4):
    """`count` float32 tensors of one shape (n,), 1 ≤ n ≤ `size`."""
    return st.integers(1, size).flatmap(
        lambda n: st.tuples(*[st.lists(floats(limit), min_size=n, max_size=n).map(torch.tensor)] * count)
    )


@many
@given(pair=vectors(2), lam=st.floats(0, 1))
def test_slerp_of_any_vectors(pair, lam):
    """The arc is finite, from a to b, the same from b to a, no longer than its two terms; opposite vectors raise."""
    a, b = pair
    if math.pi - angle(a, b) < 1e-2:
        with pytest.raises(ValueError, match="opposite"):
            slerp(a, b, lam)
        return
    omega, norm_a, norm_b = angle(a, b), a.double().norm().item(), b.double().norm().item()
    spread = math.sin(omega) if omega >= 1e-4 else 1.0
    point = slerp(a, b, lam)
    assert point.isfinite().all()
    assert point.dtype == a.dtype
    assert (point - slerp(b, a, 1 - lam)).abs().max() <= (1e-6 * (norm_a + norm_b) + TINY) / spread
    assert (slerp(a, b, 0.0) - a).abs().max() <= 1e-6 * norm_a + TINY / spread
    assert (slerp(a, b, 1.0) - b).abs().max() <= 1e-6 * norm_b + TINY / spread
    assert point.double().norm() <= (norm_a + norm_b) / spread * (1 + 1e-6) + TINY / spread


@many
@given(rows=vectors(4), count=st.integers(1, 3), by=st.sampled_from(["block", "tensor", "model"]))
def test_merge_of_any_weights(rows, count, by):
    """Merging any finite weights is finite, or raises for opposite task vectors, and changes no input."""
    init, *policies = ({"h.0.a": row, "wte": -row, "h.0.b": row.flip(0)[:1]} for row in rows[: count + 1])
    before = [row.clone() for row in rows]
    linear = merge(init, policies, by, "linear")
    for name in init:
        tensors = [init[name], *(policy[name] for policy in policies)]
        mean, largest = sum(tensor.double() for tensor in tensors[1:]) / count, max(t.abs().max() for t in tensors)
        assert (linear[name] - mean).abs().max() <= 1e-6 * largest + TINY
    try:
        merged = merge(init, policies, by)
    except ValueError as error:
        assert "opposite" in str(error)
        return
    assert {*merged} == {*init}
    assert all(merged[name].isfinite().all() and merged[name].shape == init[name].shape for name in init)
    assert all(torch.equal(row, old) for row, old in zip(rows, before))


# Losses


def logits(limit):
    """Two float32 tensors (B, K), K ≥ 2."""

    def pair(shape):
        numbers = st.lists(floats(limit), min_size=math.prod(shape), max_size=math.prod(shape))
        return st.tuples(*[numbers.map(lambda flat: torch.tensor(flat).view(shape))] * 2)

    return st.tuples(st.integers(1, 2), st.sampled_from([2, 3, 10])).flatmap(pair)


@many
@given(pair=logits(1e30))
def test_ordinal_loss_of_any_logits(pair):
    """No finite logits make the loss negative or infinite; the outcomes have probability 1, with all or half ties."""
    a, b = pair
    k, tie = a.shape[1], (a.log_softmax(-1) + b.log_softmax(-1)).logsumexp(-1).exp()
    for ties, rest in (("strict", tie), ("half", 0 * tie)):
        win, defeat = preference_logprob(a, b, ties), preference_logprob(b, a, ties)
        assert (win <= 1e-5).all() and win.isfinite().all()
        torch.testing.assert_close(win.exp() + defeat.exp() + rest, torch.ones_like(tie), rtol=0, atol=1e-5)
        for c in (0.0, 0.01):
            assert -1e-5 <= ordinal_loss(a, b, ties, c) < math.inf
    mean, sigma = rating_mean_std(a)
    assert ((mean >= 1 - 1e-5) & (mean <= k + 1e-5)).all()
    assert ((sigma >= 0) & (sigma <= (k - 1) / 2 + 1e-5)).all()


@many
@given(pair=logits(1e4), ties=st.sampled_from(["strict", "half"]), c=st.sampled_from([0.0, 0.01]))
def test_ordinal_gradient_of_large_logits(pair, ties, c):
    """Logits up to 10 000 have finite gradients, which sum to 0 over the ratings: a softmax has no level."""
    chosen, rejected = (tensor.requires_grad_() for tensor in pair)
    ordinal_loss(chosen, rejected, ties, c).backward()
    for tensor in pair:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.sum(-1).abs().max() < 0.02


@many
@given(triple=vectors(3), c=st.sampled_from([0.0, 0.01]))
def test_pairwise_loss_of_any_rewards(triple, c):
    """No finite rewards and margins make the loss NaN or negative; gradients are finite, and 1/B without centering."""
    chosen, rejected = (tensor.requires_grad_() for tensor in triple[:2])
    assert pairwise_loss(chosen, rejected, None, c) >= 0
    loss = pairwise_loss(*triple, c)
    assert loss >= 0
    loss.backward()
    for grad in (chosen.grad, rejected.grad):
        assert grad.isfinite().all()
        assert c or (grad.abs() <= 1 / len(grad) + 1e-6).all()

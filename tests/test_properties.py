"""Properties on inputs that nobody would write down: readers never raise a traceback, finite numbers give no NaN."""

import copy
import json
import math
import pickle

import pytest
import torch

from rlhf_min.batches import Batches, pad
from rlhf_min.checkpoint import load_checkpoint, save_checkpoint
from rlhf_min.data import load_pairs, load_prompts, read_prompts, read_rows, read_texts, write_jsonl
from rlhf_min.errors import UserError
from rlhf_min.files import read_json
from rlhf_min.lora import add_lora, load_adapter, read_adapter, save_adapter
from rlhf_min.losses import ordinal_loss, pairwise_loss, preference_logprob, rating_mean_std
from rlhf_min.options import parse_options
from rlhf_min.preflight import check_model
from rlhf_min.rollout import completion_mask
from rlhf_min.warp import angle, interpolate, merge, slerp
from train_warp import WarpOptions

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")
PHASES = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate", "shrink")]
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=PHASES)
many = hypothesis.settings(few, max_examples=40)

CPU = torch.device("cpu")
OPTIONS = ("lr", "seed", "judges", "resume", "merge_by", "eta", "out", "policy", "gamma")
FIELDS = ("prompt", "chosen", "rejected", "text", "label", "margin")
WORDS = ("!!float", "!!int", "!!bool", "!!timestamp", "!!binary", "!!python/name:os.system", "lr", "eta", "'", '"',
         ":", "-", " ", "\n", "[", "]", "{", "}", "&a", "*a", "<<", "?", "|", "%", "1", "_", "0x", "e")  # fmt: skip

texts = st.text(st.characters(exclude_categories=["Cs"]))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=3
)
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.lists(st.fixed_dictionaries({}, optional={"role": roles | leaves, "content": texts | leaves}), max_size=3)
row_dicts = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, texts | messages | values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that all examples of a test write the same file in."""
    return tmp_path_factory.mktemp("properties")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """The bytes of a small checkpoint."""
    save_checkpoint(folder / "whole.pt", step=3, state={"a": torch.arange(4.0), "b": [1, "x", None]}, kept=())
    return (folder / "whole.pt").read_bytes()


def refused_or_read(read, name):
    """What `read` returns, as a list; None where it raised a UserError, which must name the file or a flag."""
    try:
        return list(read())
    except UserError as error:
        assert any(part in str(error) for part in (name, "--"))


# readers


READERS = [read_rows, load_pairs, read_prompts, read_texts]


@few
@given(
    content=st.binary(max_size=200),
    reader=st.sampled_from(READERS),
    suffix=st.sampled_from(["jsonl", "jsonl.gz", "txt"]),
)
def test_no_bytes_are_a_traceback(folder, content, reader, suffix):
    """T58: whatever bytes a file holds, a reader returns rows or names the file in a UserError."""
    path = folder / f"a.{suffix}"
    path.write_bytes(content)
    refused_or_read(lambda: reader(str(path)), path.name)


@many
@given(rows=st.lists(row_dicts | values, max_size=3), reader=st.sampled_from(READERS))
def test_no_json_is_a_traceback(folder, rows, reader):
    """T58: whatever JSON the fields of a row hold, messages included, the reader returns rows or names the file."""
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    refused_or_read(lambda: reader(str(path)), path.name)


@few
@given(rows=st.lists(row_dicts, min_size=1, max_size=3))
def test_no_prompt_is_a_traceback(folder, tiny_tokenizer, rows):
    """T58: what is read goes through the tokenizer, too: prompts have tokens, 1 to --max-length."""
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    try:
        prompts = load_prompts(str(path), tiny_tokenizer, prompt_tokens=2, max_length=9)
    except UserError:
        return
    assert prompts
    assert all(1 <= len(prompt.tokens) < 9 for prompt in prompts)


@many
@given(written=st.lists(texts, min_size=1, max_size=5))
def test_any_text_survives_writing_and_reading(folder, written):
    """T70: any text without surrogates is read as it was written, one row a text; as a pair and a prompt, too."""
    path = folder / "a.jsonl"
    write_jsonl(path, [{"text": text, "prompt": text, "chosen": text, "rejected": "no"} for text in written])
    assert [row["text"] for _, row in read_rows(str(path))] == written
    if all(text.strip() for text in written):
        assert list(read_texts(str(path))) == written
        assert [prompt for _, prompt, _ in read_prompts(str(path))] == written
        assert [(pair.prompt, pair.chosen) for pair in load_pairs(str(path))[0]] == [(text, text) for text in written]


def refused_or_parsed(path):
    return refused_or_read(lambda: [parse_options(WarpOptions, ["--config", str(path)])], path.name)


@many
@given(content=st.binary(max_size=100) | st.text(max_size=50).map(lambda text: text.encode(errors="replace"))
       | st.dictionaries(st.sampled_from(OPTIONS), values).map(lambda config: json.dumps(config).encode()))  # fmt: skip
def test_no_configuration_is_a_traceback(folder, content):
    """T59: whatever --config names, its options are parsed, or file or flag is named; JSON is YAML, too."""
    (folder / "a.yaml").write_bytes(content)
    refused_or_parsed(folder / "a.yaml")


@many
@given(words=st.lists(st.sampled_from(WORDS), max_size=12))
@hypothesis.example(words=["lr", ":", " ", "!!float", " ", '"', '"'])
@hypothesis.example(words=["lr", ":", " ", "!!bool", " ", "1"])
def test_no_yaml_is_a_traceback(folder, words):
    """T59: tags, anchors, quotes and brackets in any order are parsed or refused, and no tag makes an object."""
    (folder / "a.yaml").write_text("".join(words), encoding="utf-8")
    refused_or_parsed(folder / "a.yaml")


@few
@given(config=st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()), weights=st.binary(max_size=60))
def test_no_model_folder_is_a_traceback(folder, config, weights):
    """T58: whatever config.json and the weights hold, the check before torch passes or names the file."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_bytes(config)
    (model / "model.safetensors").write_bytes(weights)
    refused_or_read(lambda: read_json(model / "config.json"), "config.json")
    refused_or_read(lambda: [check_model(str(model))], "model")


CONFIG_KEYS = ("peft_type", "lora_alpha", "r", "bias", "use_dora", "rank_pattern", "init_lora_weights", "lora_dropout",
               "base_model_name_or_path")  # fmt: skip


@many
@given(
    changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), values | st.sampled_from(["LORA", "none", 1e400]), max_size=3)
)
def test_no_adapter_config_is_a_traceback(folder, changes):
    """T63: whatever adapter_config.json says, the adapter is added to the model or its folder is named."""
    path = folder / "adapter"
    if not path.exists():
        save_adapter(add_lora(Small(), r=2, alpha=4, target_modules=["q_proj"]), path)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        (path / "adapter_config.json").write_text(json.dumps(config | changes), encoding="ascii")
        refused_or_read(lambda: read_adapter(path), "adapter")
        refused_or_read(lambda: load_adapter(Small(), path).parameters(), "adapter")
    finally:
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="ascii")


class Small(torch.nn.Module):
    """The least that adapters can be added to."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(3, 5)
        self.config = type("Config", (), {"_name_or_path": "base"})


# checkpoints


def loaded(path, content):
    """What a checkpoint of these bytes holds; None where it is refused by name."""
    path.write_bytes(content)
    try:
        return load_checkpoint(path, CPU)
    except UserError as error:
        assert path.name in str(error)


@many
@given(
    content=st.binary(max_size=200) | values.map(pickle.dumps) | st.binary(max_size=99).map(lambda b: b"PK\x03\x04" + b)
)
def test_no_bytes_are_a_checkpoint(folder, content):
    """T58: what save_checkpoint has not written is refused by name, pickles of plain values included."""
    assert loaded(folder / "state.pt", content) is None


@many
@given(data=st.data())
def test_a_checkpoint_cut_off_anywhere_is_refused(folder, checkpoint, data):
    """A checkpoint that lacks its end is refused, wherever it was cut."""
    length = data.draw(st.integers(0, len(checkpoint) - 1))
    assert loaded(folder / "state.pt", checkpoint[:length]) is None


@many
@given(data=st.data())
def test_a_checkpoint_with_a_wrong_byte_is_no_traceback(folder, checkpoint, data):
    """A checkpoint with one byte changed is refused, or still has the format of one."""
    position = data.draw(st.integers(0, len(checkpoint) - 1))
    byte = checkpoint[position] ^ data.draw(st.integers(1, 255))
    values = loaded(folder / "state.pt", checkpoint[:position] + bytes([byte]) + checkpoint[position + 1 :])
    assert values is None or "format" in values


def test_a_whole_checkpoint_is_read(folder, checkpoint):
    """The checkpoint that the tests above damage is read as it was written."""
    values = loaded(folder / "state.pt", checkpoint)
    assert (values["step"], values["state"]["a"].tolist()) == (3, [0, 1, 2, 3])


# weight averaging


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


def opposite(a, b):
    return math.pi - angle(a, b) < 1e-2


@many
@given(pair=vectors(2))
def test_angle_of_any_vectors(pair):
    """T42: for any finite vectors Ω is in [0, π], the same both ways, 0 between a vector and itself."""
    a, b = pair
    omega = angle(a, b)
    assert 0 <= omega <= math.pi
    assert angle(b, a) == omega
    assert angle(a, a) == 0
    if a.any():
        assert angle(a, -a) == pytest.approx(math.pi)


@many
@given(pair=vectors(2), lam=st.floats(0, 1))
def test_slerp_of_any_vectors(pair, lam):
    """T42, T43: finite, from a to b, the same from b to a, no longer than its two terms; opposite vectors raise."""
    a, b = pair
    if opposite(a, b):
        with pytest.raises(ValueError, match="opposite"):
            slerp(a, b, lam)
        return
    omega, norm_a, norm_b = angle(a, b), a.double().norm().item(), b.double().norm().item()
    spread = math.sin(omega) if omega >= 1e-4 else 1.0
    rounding = 1e-6 * (norm_a + norm_b) / spread + TINY / spread
    point = slerp(a, b, lam)
    assert point.isfinite().all()
    assert point.dtype == a.dtype
    assert (point - slerp(b, a, 1 - lam)).abs().max() <= rounding
    assert (slerp(a, b, 0.0) - a).abs().max() <= 1e-6 * norm_a + TINY / spread
    assert (slerp(a, b, 1.0) - b).abs().max() <= 1e-6 * norm_b + TINY / spread
    assert point.double().norm() <= (norm_a + norm_b) / spread * (1 + 1e-6) + TINY / spread


@many
@given(pair=vectors(1), lam=st.floats(0, 1), data=st.data())
def test_slerp_keeps_equal_norms(pair, lam, data):
    """T44: lemma 1 at any magnitude: between two vectors of one norm every point has that norm."""
    (a,) = pair
    order = data.draw(st.permutations(range(len(a))))
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(a), max_size=len(a))))
    b = a[order] * signs
    if opposite(a, b):
        return
    omega, norm = angle(a, b), a.double().norm().item()
    spread = math.sin(omega) if omega >= 1e-4 else 1.0
    assert slerp(a, b, lam).double().norm().item() == pytest.approx(norm, rel=1e-6 / spread, abs=TINY / spread)


@many
@given(rows=vectors(4), count=st.integers(1, 3), by=st.sampled_from(["block", "tensor", "model"]))
def test_merge_of_any_weights(rows, count, by):
    """T42, T46: merging any finite weights is finite, or raises for opposite task vectors, and changes no input."""
    init, *policies = ({"h.0.a": row, "h.0.b": row.flip(0)[:1], "wte": -row} for row in rows[: count + 1])
    before = [row.clone() for row in rows]
    try:
        merged = merge(init, policies, by)
    except ValueError as error:
        assert "opposite" in str(error)
        return
    assert list(merged) == list(init)
    assert all(merged[name].isfinite().all() and merged[name].shape == init[name].shape for name in init)
    assert all(torch.equal(row, old) for row, old in zip(rows, before))
    same = merge(init, [policies[0]] * count, by)
    for name, tensor in policies[0].items():
        largest = max(init[name].abs().max().item(), tensor.abs().max().item())
        assert (same[name] - tensor).abs().max() <= 1e-6 * largest + TINY


@many
@given(pair=vectors(2), weight=st.floats(0, 1))
def test_interpolation_of_any_weights(pair, weight):
    """T47: finite and between both ends, which are themselves to the bit."""
    start, end = ({"w": vector} for vector in pair)
    point = interpolate(start, end, weight)["w"]
    low, high = torch.minimum(*pair), torch.maximum(*pair)
    rounding = 1e-6 * torch.maximum(low.abs(), high.abs()) + TINY
    assert ((point >= low - rounding) & (point <= high + rounding)).all()
    assert torch.equal(interpolate(start, end, 0.0)["w"], pair[0])
    assert torch.equal(interpolate(start, end, 1.0)["w"], pair[1])


# losses


def logits(limit):
    """Two float32 tensors (B, K), K ≥ 2."""

    def pair(shape):
        rows = st.lists(
            st.lists(floats(limit), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        )
        return st.tuples(rows.map(torch.tensor), rows.map(torch.tensor))

    return st.tuples(st.integers(1, 2), st.sampled_from([2, 3, 10])).flatmap(pair)


@many
@given(pair=logits(1e30), ties=st.sampled_from(["strict", "half"]), c=st.sampled_from([0.0, 0.01]))
def test_ordinal_loss_of_any_logits(pair, ties, c):
    """T28: for any finite logits log P is at most 0 and the loss at least 0: no NaN, and no infinity either."""
    log_p = preference_logprob(*pair, ties)
    assert (log_p <= 1e-5).all()
    assert log_p.isfinite().all()
    loss = ordinal_loss(*pair, ties, c)
    assert loss.isfinite()
    assert loss >= -1e-5


@many
@given(pair=logits(1e4), ties=st.sampled_from(["strict", "half"]), c=st.sampled_from([0.0, 0.01]))
def test_ordinal_gradient_of_large_logits(pair, ties, c):
    """T28: logits up to 10 000 have finite gradients, which sum to 0 over the ratings: a softmax has no level."""
    chosen, rejected = (tensor.requires_grad_() for tensor in pair)
    ordinal_loss(chosen, rejected, ties, c).backward()
    for tensor in pair:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.sum(-1).abs().max() < 0.02


@many
@given(pair=logits(1e30))
def test_the_three_outcomes_have_probability_one(pair):
    """T29: P(a > b) + P(b > a) + P(tie) = 1, and with half of the ties P(a ≻ b) + P(b ≻ a) = 1."""
    a, b = pair
    tie = (a.log_softmax(-1) + b.log_softmax(-1)).logsumexp(-1).exp()
    total = preference_logprob(a, b).exp() + preference_logprob(b, a).exp() + tie
    halves = preference_logprob(a, b, "half").exp() + preference_logprob(b, a, "half").exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    torch.testing.assert_close(halves, torch.ones_like(halves), rtol=0, atol=1e-5)


@many
@given(pair=logits(1e30))
def test_mean_and_deviation_of_any_ratings(pair):
    """T32: the mean is within [1, K] and σ within [0, (K − 1)/2], whatever the logits are."""
    k = pair[0].shape[1]
    mean, sigma = rating_mean_std(pair[0])
    assert ((mean >= 1 - 1e-5) & (mean <= k + 1e-5)).all()
    assert ((sigma >= 0) & (sigma <= (k - 1) / 2 + 1e-5)).all()


@pytest.mark.parametrize("c", [0.0, 0.01])
@many
@given(triple=vectors(3, 1e30))
def test_pairwise_loss_of_any_rewards(c, triple):
    """T24, T25: no finite rewards and margins make the loss NaN or negative, with and without centering."""
    for margin in (None, triple[2]):
        loss = pairwise_loss(*triple[:2], margin, c)
        assert not loss.isnan()
        assert loss >= 0


@many
@given(triple=vectors(3, 1e4))
def test_pairwise_gradient_of_large_rewards(triple):
    """T24: rewards up to 10 000 have finite gradients; without centering none is above 1/B."""
    chosen, rejected = (tensor.requires_grad_() for tensor in triple[:2])
    pairwise_loss(chosen, rejected, triple[2]).backward()
    assert all((tensor.grad.abs() <= 1 / len(tensor) + 1e-6).all() for tensor in (chosen, rejected))
    pairwise_loss(chosen, rejected, triple[2], 0.01).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (chosen, rejected))


# masks, padding, batches


ids = st.integers(0, 4)
rectangles = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(ids, min_size=n, max_size=n), min_size=1, max_size=4)
)


@many
@given(rows=rectangles, eos=ids | st.lists(ids, min_size=1, max_size=3))
def test_completion_mask_is_a_loop(rows, eos):
    """T1, T4: the mask is what a loop over the tokens says, for one EOS and for several."""
    ends = eos if isinstance(eos, list) else [eos]
    expected = []
    for row in rows:
        mask, alive = [], True
        for token in row:
            mask.append(alive)
            alive = alive and token not in ends
        expected.append(mask)
    assert completion_mask(torch.tensor(rows), eos).tolist() == expected


@many
@given(
    rows=st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
)
def test_padding_is_a_loop(rows, side):
    """T1, T3: every row stands at its side, in order, and the mask is True on it alone, also where a token is pad."""
    tokens, mask = pad(rows, 2, CPU, side)
    width = max(len(row) for row in rows)
    for row, padded, real in zip(rows, tokens.tolist(), mask.tolist()):
        start = width - len(row) if side == "left" else 0
        for column in range(width):
            inside = start <= column < start + len(row)
            assert real[column] is inside
            assert padded[column] == (row[column - start] if inside else 2)


@many
@given(count=st.integers(1, 7), batch_size=st.integers(1, 9), drawn=st.integers(0, 5), seed=st.integers(0, 99))
def test_batches_are_a_loop_over_epochs(count, batch_size, drawn, seed):
    """T59: the batches one after the other are whole epochs, each item once; a saved state goes on with the same."""
    items = [f"item {i}" for i in range(count)]
    stream = Batches(items, batch_size, torch.Generator().manual_seed(seed))
    queue = [item for _ in range(drawn) for item in next(stream)]
    assert len(queue) == drawn * batch_size
    state = copy.deepcopy(stream.state_dict())
    rest = [next(stream) for _ in range(3)]
    queue += [item for batch in rest for item in batch]
    for start in range(0, len(queue) - count + 1, count):
        assert sorted(queue[start : start + count]) == items
    again = Batches(items, batch_size, torch.Generator())
    again.load_state_dict(state)
    assert [next(again) for _ in range(3)] == rest

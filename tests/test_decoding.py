"""The fast way to the next token's logits gives those of the plain one, whatever family, padding and adapters are."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
)

from rlhf_min import decoding
from rlhf_min.decoding import Decoder, positions
from rlhf_min.lora import LoRALayer, add_lora, lora_disabled, lora_layers
from rlhf_min.rollout import Rollout, token_logprobs

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "intermediate_size": 64}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=64),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, max_position_embeddings=64),
    "gpt_neox": GPTNeoXConfig(**SHAPE, max_position_embeddings=64),
}
TOKENS = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7], [0, 0, 0, 0, 11]])
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
NEXT = torch.tensor([[12, 13, 14], [15, 16, 17], [18, 19, 20]])


@pytest.fixture(autouse=True, params=[0, decoding.PACK_FROM], ids=["packed", "plain"])
def pack(request, monkeypatch):
    """Every test twice: with all matrices in oneDNN's order, and with none, since all of them are small."""
    monkeypatch.setattr(decoding, "PACK_FROM", request.param)


def build(family):
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[family])
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def plain(model, tokens, real):
    """The logits of the last token, from all of them in one pass without a cache."""
    return model(input_ids=tokens, attention_mask=real, position_ids=positions(real), use_cache=False).logits[:, -1]


@torch.no_grad()
def decode(model, tokens=TOKENS, real=REAL, length=8):
    """[logits after the prompts, and after each token of NEXT]"""
    with Decoder(model, real, length) as decoder:
        return [decoder(tokens), *(decoder(column[:, None]) for column in NEXT.T)], decoder


def expected(model):
    ones = torch.ones_like(NEXT, dtype=torch.bool)
    return [plain(model, torch.cat([TOKENS, NEXT[:, :t]], 1), torch.cat([REAL, ones[:, :t]], 1)) for t in range(4)]


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_every_family(family):
    """T1, T56: padded prompts and cached tokens give what one pass over all gives, in each family that is fast."""
    model = build(family)
    logits, decoder = decode(model)
    assert decoder.fast
    for got, want in zip(logits, expected(model)):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [
    MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),  # a state instead of keys and values
    OpenAIGPTConfig(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4),  # takes no cache, gives all logits
], ids=["mamba", "openai-gpt"])  # fmt: skip
def test_models_without_a_cache_of_keys(config):
    """T2, T56: they see all tokens again at each step, and the scorer reads the same positions as everywhere."""
    torch.manual_seed(1)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    real = torch.ones_like(REAL)
    ones = torch.ones(3, 8, dtype=torch.bool)
    with torch.no_grad():
        want = [model(input_ids=torch.cat([TOKENS, NEXT[:, :t]], 1), use_cache=False).logits[:, -1] for t in range(4)]
        rollout = Rollout(torch.cat([TOKENS, NEXT], 1), ones, ones[:, :3], ones[:, 0])
        got_logprobs = token_logprobs(model, rollout, 0.7)
    logits, _ = decode(model, TOKENS, real)
    for got, expect in zip(logits, want):
        torch.testing.assert_close(got, expect, atol=2e-5, rtol=1e-4)
    for t in range(3):
        scored = (want[t] / 0.7).log_softmax(-1).gather(1, NEXT[:, t : t + 1])[:, 0]
        torch.testing.assert_close(got_logprobs[:, t], scored, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"sliding_window": 4}, {"_attn_implementation": "eager"}])
def test_other_attention_is_called_as_it_is(changes):
    """T56: a window of four tokens is no business of a mask that shows them all: transformers' own cache is taken."""
    model = build("mistral")
    for name, value in changes.items():
        setattr(model.config, name, value)
    logits, decoder = decode(model)
    assert not decoder.fast
    for got, want in zip(logits, expected(model)):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_rows_that_leave():
    """T56: when rows leave the batch, the others' logits are what they were."""
    model, keep = build("llama"), torch.tensor([True, False, True])
    whole, _ = decode(model)
    with torch.no_grad(), Decoder(model, REAL, 8) as decoder:
        decoder(TOKENS)
        decoder(NEXT[:, :1])
        assert decoder.keep(keep)
        for t in (1, 2):
            torch.testing.assert_close(decoder(NEXT[keep, t : t + 1]), whole[t + 1][keep], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_merged_while_it_samples(family):
    """T50: the logits are those of W + ΔW, with adapters off those of W; afterwards the layers are where they were."""
    model = add_lora(build(family), r=3, alpha=6.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    before = dict(model.named_modules())
    for got, want in zip(decode(model)[0], expected(model)):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    with lora_disabled(model):
        torch.testing.assert_close(decode(model)[0][-1], expected(model)[-1], atol=5e-5, rtol=1e-4)
        off = expected(model)[-1]
    assert not torch.allclose(expected(model)[-1], off, atol=1e-2)
    assert dict(model.named_modules()) == before
    assert isinstance(model.get_submodule(next(iter(lora_layers(model)))), LoRALayer)


@pytest.mark.parametrize(("width", "rows", "packed"), [(512, 32, True), (512, 33, False), (64, 8, False)])
def test_what_is_packed(monkeypatch, width, rows, packed):
    """Large matrices for few rows: elsewhere a second copy of the weights is not worth its memory."""
    monkeypatch.setattr(decoding, "PACK_FROM", 2**17)
    layer, x = torch.nn.Linear(width, width), torch.randn(rows, 1, width)
    fast = decoding._Linear(layer, rows)
    assert fast.onednn == (packed and torch.backends.mkldnn.is_available())
    torch.testing.assert_close(fast(x), layer(x), atol=1e-5, rtol=1e-5)


def test_the_model_comes_back_after_an_error():
    """A run that is stopped in the middle of an answer leaves the model as it was."""
    model = build("gpt2")
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError), Decoder(model, REAL, 8):
        raise RuntimeError
    assert dict(model.named_modules()) == before


def test_training_after_sampling():
    """T12: the copies that sampling uses are gone: the gradient reaches the weights themselves."""
    model = build("gpt2")
    decode(model)
    model(input_ids=TOKENS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_of_autocast():
    """T10: under autocast the products are in bfloat16, as training's are: the same logits up to its rounding."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = decode(model)[0], expected(model)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.float(), b.float(), atol=0.3, rtol=0.05)


class Graph:
    """A stand-in for CUDA's: what is recorded runs again at each replay."""

    def replay(self):
        self.step()


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_recorded_step(monkeypatch, family, works):
    """On a GPU the step is a graph, up to the last token; where it cannot be recorded, sampling goes on without."""
    model, graph = build(family), Graph()
    forward = Decoder._forward

    @contextlib.contextmanager
    def record(made, capture_error_mode):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    def remember(self, tokens, mask, position_ids):
        if tokens is getattr(self, "token", None):  # it is the graph's own step
            graph.step = lambda: self.logits.copy_(
                forward(
                    self, tokens, self.mask.index_fill_(-1, self.slot, 0.0), self.positions.index_select(1, self.slot)
                )
            )
        return forward(self, tokens, mask, position_ids)

    monkeypatch.setattr(Decoder, "_forward", remember)
    monkeypatch.setattr(Decoder, "records", True)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: graph,
                       "stream": lambda s: contextlib.nullcontext(), "graph": record}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    tail = torch.randint(1, 50, (3, 17))
    with torch.no_grad(), Decoder(model, REAL, 22) as decoder:
        decoder.real = SimpleNamespace(is_cuda=True, __len__=lambda: 3)
        decoder(TOKENS)
        got = [decoder(tail[:, t : t + 1]).clone() for t in range(17)]
        assert (decoder.graph is graph) == works
        assert not works or not decoder.keep(torch.tensor([True, True, False]))
    assert Decoder.records == works
    ones = torch.ones_like(tail, dtype=torch.bool)
    for t in range(17):
        want = plain(model, torch.cat([TOKENS, tail[:, : t + 1]], 1), torch.cat([REAL, ones[:, : t + 1]], 1))
        torch.testing.assert_close(got[t], want, atol=5e-5, rtol=1e-4)

"""LoRA against W + (α/r) B A worked out by hand, and against PEFT."""

import copy
import json
import math
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.pytorch_utils import Conv1D

from rlhf_min import warp
from rlhf_min.errors import UserError
from rlhf_min.lora import (
    LoRALayer,
    add_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    reset_lora,
    save_adapter,
    set_adapters,
)
from rlhf_min.models import (
    dense_weights,
    get_weights,
    load_classifier,
    load_policy,
    load_tokenizer,
    save_model,
    set_weights,
    trained_weights,
)

R, ALPHA, S = 3, 4.5, 1.5  # s = α/r
CPU = torch.device("cpu")
SMALL = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
LLAMA = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
GPT2 = {"n_positions": 64, "n_layer": 2, "n_embd": 16, "n_head": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
DISTILBERT = {"dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64,
              "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}  # fmt: skip
BERT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 66, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "distilbert-10": (DistilBertForSequenceClassification, DistilBertConfig, {**DISTILBERT, "num_labels": 10}),
    "distilbert-1": (DistilBertForSequenceClassification, DistilBertConfig, {**DISTILBERT, "num_labels": 1}),
    "gpt2-score": (GPT2ForSequenceClassification, GPT2Config, {**GPT2, "num_labels": 1}),
    "llama-score": (LlamaForSequenceClassification, LlamaConfig, {**LLAMA, "num_labels": 1}),
    "bert": (BertForSequenceClassification, BertConfig, {**BERT, "num_labels": 1}),
}
ADAPTED = {
    "llama": [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"],
    "gpt2": [f"transformer.h.{i}.attn.c_attn" for i in range(2)],
    "distilbert": [f"distilbert.transformer.layer.{i}.attention.{x}_lin" for i in range(2) for x in "qv"],
    "bert": [f"bert.encoder.layer.{i}.attention.self.{x}" for i in range(2) for x in ("query", "value")],
}
HEADS = ("score", "classifier", "pre_classifier")
TOKENS = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
INPUTS = {"input_ids": TOKENS.where(MASK == 1, 1), "attention_mask": MASK}


@torch.no_grad()
def build(kind):
    """A small random model in eval mode, float32, biases included; the same at every call."""
    model_class, config_class, sizes = MODELS[kind]
    torch.manual_seed(5)
    model = model_class(config_class(**SMALL, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def draw(model, seed=1):
    """Give all adapters a random B, so that ΔW is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def adapted(kind, seed=1, **kwargs):
    """That model with adapters of rank 3 and s = 1.5 that do something."""
    return draw(add_lora(build(kind), R, ALPHA, **kwargs), seed)


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def is_head(name):
    return name.split(".")[0] in HEADS


@torch.no_grad()
def other_head(model):
    """Another random head, as a fresh process would draw."""
    for name, parameter in model.named_parameters():
        if is_head(name):
            parameter.normal_(std=0.2)
    return model


def factors(model):
    """{name of the module: (A, B)}"""
    weights = dict(model.named_parameters())
    names = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    return {name: (weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]) for name in names}


def shaped(delta, weight):
    """ΔW (out, in) as its module stores W: Conv1D has (in, out), and no Conv1D of these tests is square."""
    return delta if delta.shape == weight.shape else delta.T


def by_hand(model, plain, s=S):
    """{name.weight: W + s B A}, from the plain model's W."""
    weights = dict(plain.named_parameters())
    return {f"{name}.weight": weights[f"{name}.weight"] + shaped(s * b @ a, weights[f"{name}.weight"])
            for name, (a, b) in factors(model).items()}  # fmt: skip


def difference(a, b):
    return (a - b).abs().max().item()


def close(got, expected, atol):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


# In the model


def test_adding_adapters_changes_nothing(kind):
    """B = 0 at first: the logits are those of the plain model, in eval mode and in train mode without dropout."""
    plain = build(kind)
    before, model = logits(plain), add_lora(build(kind), R, ALPHA)
    assert not any(module.training for module in model.modules())
    close(logits(model), before, atol=1e-6)
    model = add_lora(build(kind).train(), R, ALPHA)
    assert all(module.training for module in model.modules())
    close(logits(model), before, atol=1e-6)


def test_the_default_targets_are_the_attention_of_every_family(kind):
    """Query and value get an adapter, or GPT-2's one matrix for both; nothing else is touched."""
    model = add_lora(build(kind), R, ALPHA)
    assert list(lora_layers(model)) == ADAPTED[kind.split("-")[0]]
    assert lora_layers(build(kind)) == {}


def test_only_adapters_and_heads_are_trained(kind):
    """T12: gradients reach A, B and the head; every frozen weight has none, and W's values stay."""
    model, plain = adapted(kind), build(kind)
    model(**INPUTS).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if "pooler" in name:  # BERT's belongs to the backbone or to the head, as one likes
            continue
        assert (name in trained) == (is_head(name) or name.endswith(("lora_A", "lora_B"))), name
        assert (parameter.grad is not None) == (name in trained), name
        if "lora_" in name:
            assert parameter.grad.abs().max() > 0, name
    assert sum("lora_" in name for name in trained) == 2 * len(lora_layers(model))
    assert set(trained_weights(model)) == trained
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())


def test_the_model_computes_w_plus_s_b_a(kind):
    """The adapted model is the plain model at W + (α/r) B A worked out by hand."""
    model, plain = adapted(kind), build(kind)
    with torch.no_grad():
        expected = functional_call(plain, by_hand(model, plain), kwargs=INPUTS).logits
    close(logits(model), expected, atol=1e-5)
    assert difference(expected, logits(plain)) > 1e-2


def test_a_merged_model_is_the_unmerged_one(kind):
    """T63: merged and unmerged agree to 1e-5; the merged model is a plain one with the same names, in the same mode."""
    model, plain = adapted(kind), build(kind)
    unmerged, expected = logits(model), by_hand(model, plain)
    assert merge_lora(model) is model
    close(logits(model), unmerged, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for (name, got), want in zip(model.named_parameters(), plain.parameters()):
        assert got.requires_grad
        close(got, expected.get(name, want), atol=1e-6 if name in expected else 0.0)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in merge_lora(adapted(kind).train()).modules())


def test_dense_weights_are_w_plus_delta_by_the_name_of_w(kind):
    """T49: what WARP merges is W + s B A of the adapted modules, a copy; a plain model has all its weights."""
    model, plain = adapted(kind), build(kind)
    dense, expected = dense_weights(model), by_hand(model, plain)
    assert list(dense) == list(expected) == [f"{name}.weight" for name in ADAPTED[kind.split("-")[0]]]
    for name, weight in dense.items():
        close(weight, expected[name].detach(), atol=1e-6)
        assert not weight.requires_grad
    assert set(dense_weights(plain)) == {name for name, _ in plain.named_parameters()}


def test_disabled_adapters_leave_exactly_the_base(kind):
    """The policy without its adapters is its own reference, to the bit; behind the block they are on again."""
    model = adapted(kind)
    on, base = logits(model), logits(add_lora(build(kind), R, ALPHA))
    with lora_disabled(model):
        close(logits(model), logits(build(kind)), atol=1e-6)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    assert difference(on, base) > 1e-2


def test_an_exception_turns_adapters_on_again():
    """An error or Ctrl-C inside lora_disabled leaves no policy without its adapters; a plain model is no error."""
    model = adapted("gpt2")
    on = logits(model)
    with pytest.raises(KeyboardInterrupt), lora_disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on)
    with lora_disabled(build("gpt2")):
        pass


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert-10"])
def test_gradients_are_those_of_the_dense_factorisation(kind):
    """T12: ∂/∂A and ∂/∂B equal autograd through the plain model at W + s B A, and finite differences, in float64."""
    model, plain = adapted(kind).double(), build(kind).double()
    direction = torch.randn(logits(plain).shape, dtype=torch.float64)
    loss = lambda: (model(**INPUTS).logits * direction).sum()
    loss().backward()
    leaves = {name: [p.detach().clone().requires_grad_() for p in pair] for name, pair in factors(model).items()}
    weights = dict(plain.named_parameters())
    dense = {f"{name}.weight": weights[f"{name}.weight"].detach() + shaped(S * b @ a, weights[f"{name}.weight"])
             for name, (a, b) in leaves.items()}  # fmt: skip
    (functional_call(plain, dense, kwargs=INPUTS).logits * direction).sum().backward()
    for name, pair in factors(model).items():
        for got, leaf in zip(pair, leaves[name]):
            assert leaf.grad.abs().max() > 1e-3
            close(got.grad, leaf.grad, atol=1e-10)
            if kind == "llama":  # its norms and positions are computed in float32, too coarse for differences
                continue
            with torch.no_grad():
                value, h = got[1, 2].item(), 1e-5
                ends = []
                for x in (value + h, value - h):
                    got[1, 2] = x
                    ends.append(loss().item())
                got[1, 2] = value
            assert got.grad[1, 2].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7)


def test_adapters_alone_can_be_exchanged():
    """T37: functional_call with a dictionary of A and B, as WARP's anchor, evaluates there and leaves the policy."""
    model, anchored = adapted("gpt2", seed=1), adapted("gpt2", seed=2)
    anchor = get_weights(anchored)
    assert {name.rpartition(".")[2] for name in anchor} == {"lora_A", "lora_B"}
    before, expected = logits(model), logits(anchored)
    assert difference(before, expected) > 1e-2
    with torch.no_grad():
        assert torch.equal(functional_call(model, anchor, kwargs=INPUTS).logits, expected)
        half = functional_call(model, {k: v for k, v in anchor.items() if ".h.0." in k}, kwargs=INPUTS).logits
    assert torch.equal(logits(model), before)
    set_weights(model, {k: v for k, v in anchor.items() if ".h.0." in k})
    assert torch.equal(logits(model), half)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dense_weights_are_evaluated_without_the_adapters(kind):
    """T46: a policy's dense weights, given while its adapters are off, are that policy, as WARP's reference is."""
    model, other = adapted(kind, seed=1), adapted(kind, seed=2)
    with torch.no_grad(), lora_disabled(model):
        got = functional_call(model, dense_weights(other), kwargs=INPUTS).logits
    close(got, logits(other), atol=1e-5)


# A layer


def layers(r=2, alpha=3.0, dropout=0.0, n_in=6, n_out=4):
    """The same matrix as nn.Linear and as GPT-2's Conv1D, each with an adapter."""
    linear, conv = nn.Linear(n_in, n_out), Conv1D(n_out, n_in)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    pair = [LoRALayer(base, r, alpha, dropout) for base in (linear, conv)]
    with torch.no_grad():
        pair[0].lora_B.normal_()
        pair[1].lora_A.copy_(pair[0].lora_A)
        pair[1].lora_B.copy_(pair[0].lora_B)
    return linear, pair


def test_linear_and_conv1d_get_the_same_adapter():
    """A is (r, in), B is (out, r) for both; only ΔW is transposed. Leading dimensions are free; W's names stay."""
    linear, pair = layers()
    x = torch.randn(2, 5, 6)
    for layer in pair:
        assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 6), (4, 2))
        assert layer.delta().shape == layer.weight.shape
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_A", "lora_B"]
        close(layer(x), linear(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T, atol=1e-5)
        close(shaped(layer.delta(), linear.weight), 1.5 * layer.lora_B @ layer.lora_A, atol=1e-5)
    assert torch.equal(pair[0].delta(), pair[1].delta().T)


def test_a_layer_without_bias_and_one_of_large_rank():
    """Llama's matrices have no bias, and merging gives them none; a rank above both dimensions works."""
    base = nn.Linear(6, 4, bias=False)
    model = draw(add_lora(nn.Sequential(base), 9, 18.0, target_modules=["0"]))
    x = torch.randn(5, 6)
    expected = x @ (base.weight + 2.0 * model[0].lora_B @ model[0].lora_A).T
    close(model(x), expected, atol=1e-5)
    assert merge_lora(model)[0].bias is None
    close(model(x), expected, atol=1e-5)


def test_an_adapter_has_the_type_of_its_matrix():
    """A model in bfloat16 or float64 keeps its type."""
    for dtype in (torch.bfloat16, torch.float64):
        layer = LoRALayer(nn.Linear(6, 4).to(dtype), 2, 4.0)
        assert layer(torch.zeros(1, 6, dtype=dtype)).dtype == layer.lora_A.dtype == layer.lora_B.dtype == dtype


def test_dropout_is_before_the_adapter_only():
    """y = W x + b + s B A dropout(x): with the same random numbers, the adapter reads F.dropout(x), and W reads x."""
    linear, pair = layers(dropout=0.4)
    x = torch.randn(50, 6)
    for layer in pair:
        torch.manual_seed(1)
        got = layer.train()(x)
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.4, training=True)
        close(got, linear(x) + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T, atol=1e-5)
        assert difference(layer(x), layer(x)) > 0.1


def test_dropout_is_off_in_eval_mode_and_right_on_average():
    """In eval mode nothing is dropped; in train mode the mean over many passes is what eval mode says."""
    linear, (layer, _) = layers(dropout=0.4)
    x = torch.randn(1, 6)
    expected = linear(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    close(layer.eval()(x), expected, atol=1e-5)
    sample = layer.train()(x.expand(20_000, 6)).detach()
    standard_error = sample.std(0) / math.sqrt(len(sample))
    assert ((sample.mean(0) - expected).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("kind", ["gpt2", "distilbert-1"])
def test_dropout_reaches_the_layers_of_a_model_in_their_mode(kind):
    """T5: a model in eval mode gets adapters in eval mode, one in train mode drops; with B = 0 nothing is lost."""
    model = adapted(kind, dropout=0.5)
    assert {layer.dropout.p for layer in lora_layers(model).values()} == {0.5}
    assert torch.equal(logits(model), logits(model))
    close(logits(model), logits(adapted(kind)), atol=0.0)
    assert difference(logits(model.train()), logits(model)) > 1e-3
    fresh = add_lora(build(kind).train(), R, ALPHA, dropout=0.5)
    close(logits(fresh), logits(build(kind)), atol=1e-6)


@pytest.mark.parametrize("base", [nn.Linear(64, 16), Conv1D(16, 64)])
def test_the_first_a_is_uniform_and_b_is_zero(base):
    """A ~ U(−1/√in, 1/√in), as PEFT draws it: within the bound and close to it, mean 0, variance 1/(3 in)."""
    layer = LoRALayer(base, 200, 1.0)
    a = layer.lora_A.detach()
    assert a.shape == (200, 64)
    assert 0.999 / 8 < a.max() <= 1 / 8
    assert -0.999 / 8 > a.min() >= -1 / 8
    assert abs(a.mean().item()) < 5 * math.sqrt(1 / (3 * 64) / a.numel())
    assert a.var().item() == pytest.approx(1 / (3 * 64), rel=0.03)
    assert layer.lora_B.abs().max() == 0


def test_a_reset_starts_anew_and_repeats_with_its_seed():
    """T51: every run of WARP starts at ΔW = 0 from its own seed; the same seed repeats A, and no layer shares one."""
    model, drawn = adapted("llama"), []
    for seed in (1, 1, 2):
        draw(model)
        reset_lora(model, torch.Generator().manual_seed(seed))
        close(logits(model), logits(build("llama")), atol=1e-6)
        assert all(b.abs().max() == 0 for _, b in factors(model).values())
        drawn.append([a.detach().clone() for a, _ in factors(model).values()])
    assert all(torch.equal(first, again) for first, again in zip(drawn[0], drawn[1]))
    assert not any(torch.equal(first, other) for first, other in zip(drawn[0], drawn[2]))
    assert not torch.equal(drawn[0][0], drawn[0][2])
    plain = build("llama")
    reset_lora(plain, torch.Generator())
    assert torch.equal(logits(plain), logits(build("llama")))


# Targets


def test_named_targets_replace_the_defaults():
    """Names of the user's own, several at once, are the only modules that get an adapter."""
    model = add_lora(build("llama"), R, ALPHA, target_modules=["o_proj", "down_proj"])
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"o_proj", "down_proj"}
    assert len(lora_layers(model)) == 4
    model = add_lora(build("gpt2"), R, ALPHA, target_modules=["c_proj", "c_attn"])
    assert len(lora_layers(model)) == 6  # c_proj is in the attention and in the MLP


def test_an_unknown_target_is_named_beside_what_there_is():
    """A name that fits nothing is refused even beside one that fits, and the model is left alone."""
    model = build("llama")
    with pytest.raises(UserError, match="no linear module is named query; there are down_proj, gate_proj") as error:
        add_lora(model, R, ALPHA, target_modules=["q_proj", "query"])
    assert "o_proj, q_proj, up_proj, v_proj" in str(error.value)
    assert lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    for near in ("proj", "self_attn.q_proj", "embed_tokens"):  # a part, a path, no linear module
        with pytest.raises(UserError, match=f"is named {near};"):
            add_lora(model, R, ALPHA, target_modules=[near])


def test_a_model_without_default_targets_is_refused():
    """An architecture that has none of the default names says which names it has."""
    with pytest.raises(UserError, match=r"^--lora-target-modules: no linear .* there are 0, 2$"):
        add_lora(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), R, ALPHA)


def test_a_tied_matrix_gets_no_adapter():
    """T48: an adapter on a head tied to the embedding is refused: WARP would move the embedding with it."""
    with pytest.raises(UserError, match="lm_head"):
        add_lora(build("gpt2"), R, ALPHA, target_modules=["lm_head"])


def test_a_head_gets_no_adapter():
    """A head is trained whole; an adapter on it is refused at the start, not when it is saved."""
    with pytest.raises(UserError, match="score"):
        add_lora(build("gpt2-score"), R, ALPHA, target_modules=["c_attn", "score"])


# On disk


def test_a_saved_adapter_scores_as_before(tmp_path, kind):
    """T63, T64: logits after the round trip into a fresh model with another head; what is trained is trained again."""
    model = adapted(kind, dropout=0.25)
    save_adapter(model, tmp_path / "new" / "adapter")
    fresh = other_head(build(kind))
    assert load_adapter(fresh, tmp_path / "new" / "adapter") is fresh
    close(logits(fresh), logits(model), atol=1e-6)
    assert difference(logits(fresh), logits(build(kind))) > 1e-2
    assert not any(module.training for module in fresh.modules())
    assert {layer.dropout.p for layer in lora_layers(fresh).values()} == {0.25}
    assert set(trained_weights(fresh)) == set(trained_weights(model))
    assert all(torch.equal(new, old) for new, old in zip(fresh.parameters(), model.parameters()))


def test_the_files_are_those_of_peft(tmp_path, kind):
    """T63: two files; A (r, in) and B (out, r) by PEFT's names, the heads, and the keys that PEFT reads."""
    model = adapted(kind, dropout=0.25)
    model.config._name_or_path = "owner/name"
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    family, heads = kind.split("-")[0], sorted({n.split(".")[0] for n, _ in model.named_parameters() if is_head(n)})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["modules_to_save"] = [n for n in config["modules_to_save"] or [] if n != "pooler"] or None
    assert config == {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if heads else "CAUSAL_LM", "base_model_name_or_path": "owner/name",
        "r": 3, "lora_alpha": 4.5, "lora_dropout": 0.25, "bias": "none", "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in ADAPTED[family]}),
        "fan_in_fan_out": family == "gpt2", "modules_to_save": heads or None,
    }  # fmt: skip
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys() if "pooler" not in name}  # noqa: SIM118
    expected = {f"base_model.model.{n}": p for n, p in model.named_parameters() if is_head(n)}
    for name, (a, b) in factors(model).items():
        expected |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_alpha_is_written_not_the_scale(tmp_path):
    """α/r in thirds: the file says lora_alpha 32 for r = 3, and the scale is right after loading."""
    model = draw(add_lora(build("gpt2"), 3, 32.0))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 32.0
    close(logits(load_adapter(build("gpt2"), tmp_path)), logits(model), atol=1e-5)


# PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


PEFT_KINDS = ["llama", "gpt2", "distilbert-10", "gpt2-score"]


@pytest.mark.parametrize("kind", [*PEFT_KINDS, "bert"])
def test_peft_reads_our_files(tmp_path, peft, kind):
    """T63, T64: PEFT on the same base gives our logits, heads included, and warns of nothing."""
    model = adapted(kind)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(other_head(build(kind)), tmp_path).eval()
    close(logits(theirs), logits(model), atol=1e-5)
    assert difference(logits(theirs), logits(build(kind))) > 1e-2


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_we_read_the_files_of_peft(tmp_path, peft, kind):
    """T63, T64: what PEFT's save_pretrained wrote gives PEFT's logits here, the heads of modules_to_save included."""
    heads = sorted({name.split(".")[0] for name, _ in build(kind).named_parameters() if is_head(name)})
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if heads else "CAUSAL_LM", r=R, lora_alpha=9, init_lora_weights=False, lora_dropout=0.25,
        target_modules=sorted({name.rpartition(".")[2] for name in ADAPTED[kind.split("-")[0]]}),
        modules_to_save=heads or None, fan_in_fan_out=kind.startswith("gpt2"),
    )  # fmt: skip
    theirs = peft.get_peft_model(other_head(build(kind)), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(build(kind), tmp_path)
    close(logits(ours), logits(theirs), atol=1e-5)
    assert difference(logits(ours), logits(build(kind))) > 1e-2
    assert list(lora_layers(ours)) == ADAPTED[kind.split("-")[0]]


# By name


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A GPT-2 on disk with its tokenizer."""
    save_model(build("gpt2"), tiny_tokenizer, tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    """An adapter of it, without a tokenizer."""
    model, _ = load_policy(base, CPU, 32)
    save_adapter(draw(add_lora(model, R, ALPHA)), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_policy_is_loaded_by_the_name_of_its_adapter(tmp_path, base, adapter, tiny_tokenizer):
    """T63: the base of adapter_config.json plus ΔW, merged, in eval mode and trainable; the tokenizer is the base's."""
    model, tokenizer = load_policy(str(adapter), CPU, 32)
    tensors, plain = load_file(adapter / "adapter_model.safetensors"), build("gpt2")
    expected = dict(plain.named_parameters())
    for name in ADAPTED["gpt2"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + (S * b @ a).T
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        close(parameter, expected[name], atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert tokenizer("The film was great.") == tiny_tokenizer("The film was great.")
    adapter.rename(tmp_path / "model")  # a run folder stands for its model/
    assert torch.equal(logits(load_policy(str(tmp_path), CPU, 32)[0]), logits(model))


def test_the_adapters_own_tokenizer_comes_first(adapter, tiny_tokenizer):
    """A tokenizer beside the adapter is taken, and the embedding of the base grows to its size."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|filler|>"})
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).pad_token_id == 300
    model, _ = load_policy(str(adapter), CPU, 32)
    assert model.get_input_embeddings().num_embeddings == 301


def test_adapters_of_a_half_precision_base_are_merged_in_float32(tmp_path, adapter, tiny_tokenizer):
    """T65: base and adapter in bfloat16 give a policy in float32."""
    save_model(build("gpt2").to(torch.bfloat16), tiny_tokenizer, tmp_path / "base")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    model, _ = load_policy(str(adapter), CPU, 32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("family", ["gpt2", "distilbert"])
def test_a_reward_model_is_loaded_by_the_name_of_its_adapter(tmp_path, tiny_tokenizer, family, count):
    """T64: the score before saving is the score after loading; the head's size is in the file, ratings are 1 to 10."""
    save_model(build("gpt2" if family == "gpt2" else "distilbert-1").base_model, tiny_tokenizer, tmp_path / "base")
    model, tokenizer = load_classifier(str(tmp_path / "base"), CPU, new_head=count)
    tokenizer.add_special_tokens({"pad_token": "<|filler|>"})  # as train_rm.py does where pad is EOS
    model.resize_token_embeddings(len(tokenizer))
    other_head(draw(add_lora(model.eval(), R, ALPHA)))
    save_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_classifier(str(tmp_path / "adapter"), CPU)
    assert len(tokenizer) == loaded.get_input_embeddings().num_embeddings == 301
    assert logits(model).shape == (3, count)
    close(logits(loaded.eval()), logits(model), atol=1e-5)
    assert loaded.config.num_labels == count
    if count > 1:
        assert loaded.config.id2label == {i: str(i + 1) for i in range(10)}
        assert loaded.config.label2id == {str(i + 1): i for i in range(10)}
    save_model(loaded, tokenizer, tmp_path / "merged")  # is a classifier's folder again
    close(logits(load_classifier(str(tmp_path / "merged"), CPU)[0].eval()), logits(model), atol=1e-5)


def test_policies_and_reward_models_are_not_confused(tmp_path, base, adapter):
    """An adapter with a head is no policy, one without is no reward model; a new head can go on the latter."""
    with pytest.raises(UserError, match="no sequence classifier"):
        load_classifier(str(adapter), CPU)
    model, _ = load_classifier(str(adapter), CPU, new_head=10)
    assert model.score.weight.shape == (10, 16)
    merged = load_policy(str(adapter), CPU, 32)[0].transformer.state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.transformer.state_dict().items())
    save_adapter(add_lora(load_classifier(base, CPU, new_head=1)[0], R, ALPHA), tmp_path / "score")
    with pytest.raises(UserError, match=r"score\.weight \(1, 16\) does not fit"):
        load_policy(str(tmp_path / "score"), CPU, 32)


def test_a_head_of_another_size_is_refused(tmp_path, base):
    """T64: ratings asked of an adapter that holds one reward are an error, and not a single logit all the same."""
    save_adapter(add_lora(load_classifier(base, CPU, new_head=1)[0], R, ALPHA), tmp_path / "score")
    assert load_classifier(str(tmp_path / "score"), CPU, new_head=1)[0].num_labels == 1
    with pytest.raises(UserError, match="score"):
        load_classifier(str(tmp_path / "score"), CPU, new_head=10)


def test_an_adapter_trained_on_an_adapter_is_loaded_on_both(tmp_path, adapter):
    """T63: its base is the first adapter, merged; with the first base alone the logits would be others."""
    model, tokenizer = load_policy(str(adapter), CPU, 32)
    draw(add_lora(model, R, ALPHA), seed=2)
    save_adapter(model, tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    close(logits(load_policy(str(tmp_path / "second"), CPU, 32)[0]), logits(model), atol=1e-5)


@pytest.mark.parametrize("count", [1, 10])
def test_a_roberta_reward_model_is_loaded_by_the_name_of_its_adapter(tmp_path, tiny_tokenizer, count):
    """T64: RoBERTa's head is classifier.out_proj; its size, too, is read from the file."""
    save_model(RobertaForMaskedLM(RobertaConfig(**SMALL, **BERT)), tiny_tokenizer, tmp_path / "base")
    model, _ = load_classifier(str(tmp_path / "base"), CPU, new_head=count)
    save_adapter(draw(add_lora(model.eval(), R, ALPHA)), tmp_path / "adapter")
    close(logits(load_classifier(str(tmp_path / "adapter"), CPU)[0].eval()), logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["deberta", "bert"])
def test_a_pooler_that_the_base_lacks_is_saved_too(tmp_path, tiny_tokenizer, name):
    """T64: a masked language model has no pooler, so a classifier's is as new as its head, and must not be lost."""
    if name == "bert":
        plain, targets = BertForMaskedLM(BertConfig(**SMALL, **BERT)), None
    else:
        plain, targets = DebertaV2ForMaskedLM(DebertaV2Config(**SMALL, **BERT)), ["query_proj", "value_proj"]
    save_model(plain, tiny_tokenizer, tmp_path / "base")
    model, _ = load_classifier(str(tmp_path / "base"), CPU, new_head=1)
    save_adapter(draw(add_lora(model.eval(), R, ALPHA, target_modules=targets)), tmp_path / "adapter")
    close(logits(load_classifier(str(tmp_path / "adapter"), CPU)[0].eval()), logits(model), atol=1e-5)


def renamed(old, new):
    def rename(config, tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return rename


def tensor(end, value):
    """Put value(the tensor) in place of the first tensor whose name has that end."""

    def change(config, tensors):
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = value(tensors[name]).contiguous()

    return change


FIRST = "transformer.h.0.attn.c_attn"
BAD = {
    "another method": (lambda c, t: c.update(peft_type="LOHA"), "peft_type LOHA"),
    "no method": (lambda c, t: c.pop("peft_type"), "peft_type None"),
    "DoRA": (lambda c, t: c.update(use_dora=True), "use_dora"),
    "rsLoRA": (lambda c, t: c.update(use_rslora=True), "use_rslora"),
    "ranks": (lambda c, t: c.update(rank_pattern={"c_attn": 4}), "rank_pattern"),
    "alphas": (lambda c, t: c.update(alpha_pattern={"c_attn": 4}), "alpha_pattern"),
    "biases": (lambda c, t: c.update(bias="all"), "bias all"),
    "biases of B": (lambda c, t: c.update(lora_bias=True), "lora_bias"),
    "PiSSA": (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights"),  # trains on another W
    "no base": (lambda c, t: c.pop("base_model_name_or_path"), "names no base_model_name_or_path"),
    "null base": (lambda c, t: c.update(base_model_name_or_path=None), "names no base_model_name_or_path"),
    "no alpha": (lambda c, t: c.pop("lora_alpha"), "lora_alpha"),
    "bad dropout": (lambda c, t: c.update(lora_dropout=2), "dropout"),
    "no such module": (renamed(".h.0.", ".h.7."), r"transformer\.h\.7\.attn\.c_attn does not fit"),
    "not linear": (renamed(".h.0.attn.c_attn", ".h.0.ln_1"), r"transformer\.h\.0\.ln_1 does not fit"),
    "wrong A": (tensor("lora_A.weight", lambda a: a[:, :7]), f"{FIRST} does not fit"),
    "wrong B": (tensor("lora_B.weight", lambda b: b[:-1]), f"{FIRST} does not fit"),
    "one column of A": (tensor("lora_A.weight", lambda a: a[:, :1]), f"{FIRST} does not fit"),
    "one row of B": (tensor("lora_B.weight", lambda b: b[:1]), f"{FIRST} does not fit"),
    "rank 0": (tensor("lora_A.weight", lambda a: a[:0]), rf"{FIRST} has lora_A \(0, 16\)"),
    "no B": (lambda c, t: t.pop(f"base_model.model.{FIRST}.lora_B.weight"), rf"{FIRST} .* lora_B \(\)"),
    "no A": (lambda c, t: t.pop(f"base_model.model.{FIRST}.lora_A.weight"), rf"{FIRST} has lora_A \(\)"),
    "nothing": (lambda c, t: t.clear(), "adapter"),
    "more": (lambda c, t: t.update({"base_model.model.nothing.weight": torch.ones(2)}), r"nothing\.weight \(2,\)"),
    "another embedding": (lambda c, t: t.update({"base_model.model.transformer.wte.weight": torch.ones(299, 16)}),
                          r"wte\.weight \(299, 16\) does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_does_not_fit_is_one_line(adapter, case):
    """T63: what cannot be loaded right is refused by the folder's name and never left out in silence."""
    change, fragment = BAD[case]
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=fragment) as error:
        load_policy(str(adapter), CPU, 32)
    assert str(error.value).startswith(str(adapter))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '"LORA"'])
def test_a_config_that_is_no_object_is_one_line(adapter, content):
    """An adapter_config.json that is cut off, empty or no JSON object is refused by the folder's name."""
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read") as error:
        load_policy(str(adapter), CPU, 32)
    assert str(error.value).startswith(str(adapter))


def test_missing_files_of_an_adapter_are_one_line(tmp_path, adapter):
    """Weights that are missing or damaged, and a base that does not exist, are named."""
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{adapter}/adapter_model.safetensors cannot be read"):
        load_policy(str(adapter), CPU, 32)
    weights.unlink()
    with pytest.raises(UserError, match=f"^{adapter}/adapter_model.safetensors cannot be read: No such"):
        load_policy(str(adapter), CPU, 32)


def test_a_base_that_is_gone_is_named(tmp_path, base, adapter):
    """T69: the base that adapter_config.json names is gone: one line with its name."""
    (tmp_path / "base").rename(tmp_path / "moved")
    for load in (lambda name: load_policy(name, CPU, 32), lambda name: load_classifier(name, CPU), load_tokenizer):
        with pytest.raises(UserError, match=f"{adapter} is an adapter on {base}: no such folder"):
            load(str(adapter))


# WARP


def dense_sum(model, count, s, seed=3):
    """({name: W}, {name: W + Σ_m c_m s B_m A_m}, {name: (A, B) concatenated}) of `count` adapters of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    start, end, joint = {}, {}, {}
    for name, (a, b) in factors(model).items():
        weight = dict(model.named_parameters())[f"{name}.weight"].detach().clone()
        many_a = [torch.randn(a.shape, generator=generator) for _ in range(count)]
        many_b = [torch.randn(b.shape, generator=generator) * 0.05 for _ in range(count)]
        coefficients = [0.3 + 0.2 * m for m in range(count)]
        joint[name] = torch.cat(many_a), torch.cat([c * s * b for c, b in zip(coefficients, many_b)], dim=1)
        start[f"{name}.weight"] = weight
        total = sum(c * s * b @ a for c, a, b in zip(coefficients, many_a, many_b))
        end[f"{name}.weight"] = weight + shaped(total, weight)
    return start, end, joint


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sum_of_adapters_is_one_adapter(tmp_path, kind, count):
    """T49: Σ c_m s B_m A_m is [c_1 s B_1, ...] [A_1; ...], so rank M·r gives it back, also where that exceeds W's."""
    model = adapted(kind)  # of another ΔW, which must be forgotten
    start, end, joint = dense_sum(add_lora(build(kind), R, ALPHA), count, S)
    with torch.no_grad():
        for name in start:
            dict(model.named_parameters())[name].add_(1.0)  # and of another W
    set_adapters(model, start, end, R * count)
    for name, (a, b) in factors(model).items():
        many_a, many_b = joint[name]
        assert (a.shape, b.shape) == (many_a.shape, many_b.shape)
        assert torch.equal(model.get_submodule(name).weight, start[f"{name}.weight"])
        close(b @ a, many_b @ many_a, atol=1e-6)
        close(a @ a.T, b.T @ b, atol=1e-5)  # both √Σ: neither factor is larger
        assert a.requires_grad and b.requires_grad
    for name, weight in dense_weights(model).items():
        close(weight, end[name], atol=1e-6)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (R * count, R * count)
    expected = build(kind)
    set_weights(expected, end)
    close(logits(load_adapter(build(kind), tmp_path)), logits(expected), atol=1e-5)
    assert difference(logits(expected), logits(build(kind))) > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_rank_that_is_too_low_gives_the_nearest_adapter(kind):
    """Eckart–Young: with rank 2 what is left of ΔW is its singular values from the third on."""
    model = adapted(kind)
    start, end, _ = dense_sum(add_lora(build(kind), R, ALPHA), 2, S)
    set_adapters(model, start, end, 2)
    for name, weight in dense_weights(model).items():
        left = (end[name] - weight).double()
        singular = torch.linalg.svdvals((end[name] - start[name]).double())
        assert left.norm().item() == pytest.approx(singular[2:].norm().item(), rel=1e-4)
        assert torch.linalg.matrix_norm(left, 2).item() == pytest.approx(singular[2].item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_policies_are_one_adapter_of_twice_the_rank(tmp_path, kind):
    """T49: SLERP (λ = ½) and η on dense weights give W + η c s (B_1 A_1 + B_2 A_2), c = 1 / (2 cos Ω/2) a block."""
    start = dense_weights(add_lora(build(kind), R, ALPHA))
    policies = [adapted(kind, seed=seed) for seed in (1, 2)]
    reset_and_draw(policies[1], 9)
    eta = 0.3
    merged = warp.merge(start, [dense_weights(policy) for policy in policies])
    got = warp.interpolate(start, merged, eta)

    joint = draw(add_lora(build(kind), 2 * R, 2.0 * R))  # s = 1
    for block in ("0", "1"):
        names = [name for name in ADAPTED[kind] if f".{block}." in name]
        deltas = []
        for policy in policies:
            pairs = factors(policy)
            deltas.append(torch.cat([(S * pairs[n][1] @ pairs[n][0]).detach().double().flatten() for n in names]))
        cosine = (deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm()).item()
        c = 1 / (2 * math.cos(math.acos(cosine) / 2))
        for name in names:
            (a1, b1), (a2, b2) = (factors(policy)[name] for policy in policies)
            a, b = factors(joint)[name]
            with torch.no_grad():
                a.copy_(torch.cat([a1, a2]))
                b.copy_(eta * S * c * torch.cat([b1, b2], dim=1))
    for name, weight in dense_weights(joint).items():
        close(got[name], weight, atol=1e-6)
    close(logits(merge_lora(joint)), evaluated(build(kind), got), atol=1e-5)

    end = policies[0]
    set_adapters(end, start, got, 2 * R)
    save_adapter(end, tmp_path)
    close(logits(load_adapter(build(kind), tmp_path)), evaluated(build(kind), got), atol=1e-5)


def reset_and_draw(model, seed):
    """Adapters of their own seed, A too, as every run of WARP has."""
    reset_lora(model, torch.Generator().manual_seed(seed))
    return draw(model, seed)


@torch.no_grad()
def evaluated(model, weights):
    return functional_call(model, weights, kwargs=INPUTS).logits


def test_the_mean_of_policies_is_not_the_product_of_mean_factors():
    """T49: ½ s (B_1 A_1 + B_2 A_2) is the mean of the dense weights; the means of A and of B make another matrix."""
    policies = [reset_and_draw(adapted("gpt2"), seed) for seed in (1, 2)]
    mean = warp.interpolate(*map(dense_weights, policies), 0.5)
    weights = dict(build("gpt2").named_parameters())
    for name in ADAPTED["gpt2"]:
        (a1, b1), (a2, b2) = (factors(policy)[name] for policy in policies)
        delta = (mean[f"{name}.weight"] - weights[f"{name}.weight"]).T
        close(delta, 0.5 * S * (b1 @ a1 + b2 @ a2), atol=1e-6)
        assert difference(delta, S * (b1 + b2) / 2 @ ((a1 + a2) / 2)) > 1e-2

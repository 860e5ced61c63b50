"""LoRA against W + (α/r) B A worked out by hand, and against PEFT."""

import copy
import json
import math
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from rlhf_min import lora
from rlhf_min.lora import add_lora, dense_weights, load_adapter, lora_layers, save_adapter
from rlhf_min.reward_model import load_classifier
from rlhf_min.rollout import load_policy
from rlhf_min.support import models
from rlhf_min.support.errors import UserError
from tests.test_models import refused

R, ALPHA, S = 3, 4.5, 1.5  # s = α/r
CPU = torch.device("cpu")
SMALL = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
SMALL |= {"max_position_embeddings": 66, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {"intermediate_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OTHERS = {
    "Llama": {"intermediate_size": 20, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "DistilBert": {"hidden_dim": 20, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}
KINDS = ["LlamaForCausalLM", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "LlamaForSequenceClassification"]
KINDS += ["DistilBertForSequenceClassification", "BertForSequenceClassification"]
ADAPTED = {
    "Llama": [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"],
    "GPT2": [f"transformer.h.{i}.attn.c_attn" for i in range(2)],
    "DistilBert": [f"distilbert.transformer.layer.{i}.attention.{x}_lin" for i in range(2) for x in "qv"],
    "Bert": [f"bert.encoder.layer.{i}.attention.self.{x}" for i in range(2) for x in ("query", "value")],
}
HEADS = {"score", "classifier", "pre_classifier", "pooler"}
TOKENS = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
INPUTS = {"input_ids": TOKENS.where(MASK == 1, 1), "attention_mask": MASK}
policies = pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def family(kind):
    return kind.partition("For")[0].removesuffix("LMHeadModel").removesuffix("Model")


@torch.no_grad()
def build(kind):
    """A small random model in eval mode, float32, biases included; the same at every call."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family(kind)}Config")(**SMALL, **OTHERS.get(family(kind), BERT))
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def draw(model, seed=1):
    """Give all adapters a random B, so that ΔW is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, b in factors(model).values():
        b.copy_(torch.randn(b.shape, generator=generator))
    return model


def adapted(kind, seed=None, **kwargs):
    """That model with adapters of rank 3 and s = 1.5 that do something; with a seed A is of that seed, too."""
    model = add_lora(build(kind), R, ALPHA, **kwargs)
    if seed:
        lora.reset_lora(model, torch.Generator().manual_seed(seed))
    return draw(model, seed or 1)


@torch.no_grad()
def logits(model, weights=None):
    """The model's logits, at its own weights or at others."""
    return functional_call(model, weights or {}, kwargs=INPUTS).logits


def is_head(name):
    return not HEADS.isdisjoint(name.split("."))


@torch.no_grad()
def other_head(model):
    """Another random head, as a fresh process would draw."""
    for name, parameter in model.named_parameters():
        if is_head(name):
            parameter.normal_(std=0.2)
    return model


def factors(model):
    """{name of the module: (A, B)}"""
    names = [name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")]
    return {name: tuple(model.get_parameter(f"{name}.lora_{x}") for x in "AB") for name in names}


def by_hand(pairs, plain, s=S):
    """{name.weight: W + s B A} of {name: (A, B)}, from the plain model's W; GPT-2's is (in, out), and never square."""
    weights = {}
    for name, (a, b) in pairs.items():
        weight, delta = plain.get_parameter(f"{name}.weight").detach(), s * b @ a  # (out, in)
        weights[f"{name}.weight"] = weight + (delta if delta.shape == weight.shape else delta.T)
    return weights


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def differ(got, expected):
    assert (got - expected).abs().max() > 1e-2


# In the model


def test_adding_adapters_changes_nothing(kind):
    """Query and value get an adapter, or GPT-2's one matrix for both; with B = 0 the logits stay in either mode."""
    plain = build(kind)
    assert lora_layers(plain) == {}
    for mode in (False, True):
        model = add_lora(build(kind).train(mode), R, ALPHA, dropout=0.5)
        assert list(lora_layers(model)) == ADAPTED[family(kind)]
        assert {module.training for module in model.modules()} == {mode}
        close(logits(model), logits(plain), atol=1e-6)


def test_only_adapters_and_heads_are_trained(kind):
    """Gradients reach A, B and the head; every frozen weight has none, and W's values stay."""
    model, plain = adapted(kind), build(kind)
    model(**INPUTS).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if is_head(name) or name.endswith(("lora_A", "lora_B"))}
    assert set(models.trained_weights(model)) == trained
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert "lora_" not in name or parameter.grad.abs().max() > 0, name
    assert all(torch.equal(model.get_parameter(name), p) for name, p in plain.named_parameters())


def test_the_model_computes_w_plus_s_b_a(kind):
    """The adapted model is the plain one at W + (α/r) B A worked out by hand; those are its dense weights."""
    model, plain = adapted(kind), build(kind)
    expected, dense = by_hand(factors(model), plain), dense_weights(model)
    close(logits(model), logits(plain, expected))
    differ(logits(model), logits(plain))
    assert list(dense) == list(expected)
    assert not any(weight.requires_grad for weight in dense.values())
    assert set(dense_weights(plain)) == {name for name, _ in plain.named_parameters()}
    expected = dict(plain.named_parameters()) | expected
    assert lora.merge_lora(model) is model
    assert [name for name, _ in model.named_parameters()] == list(expected)  # merged: a plain model again
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for name, parameter in model.named_parameters():
        close(parameter, expected[name], atol=1e-6)
        assert parameter.requires_grad and torch.equal(dense.get(name, parameter), parameter)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in lora.merge_lora(adapted(kind).train()).modules())


def test_disabled_adapters_leave_exactly_the_base(kind):
    """The policy without its adapters is its own reference, to the bit, also at the dense weights of another policy."""
    model, other = adapted(kind), adapted(kind, seed=2)
    on, base = logits(model), logits(add_lora(build(kind), R, ALPHA))
    with pytest.raises(KeyboardInterrupt), lora.lora_disabled(model):
        assert torch.equal(logits(model), base)
        close(logits(model, dense_weights(other)), logits(other))
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on)


def test_gradients_are_those_of_the_dense_factorisation(kind):
    """∂/∂A and ∂/∂B equal autograd through the plain model at W + s B A, in float64."""
    model, plain = adapted(kind).double(), build(kind).double()
    direction = torch.randn(logits(plain).shape, dtype=torch.float64)
    (model(**INPUTS).logits * direction).sum().backward()
    leaves = {name: [p.detach().clone().requires_grad_() for p in pair] for name, pair in factors(model).items()}
    (functional_call(plain, by_hand(leaves, plain), kwargs=INPUTS).logits * direction).sum().backward()
    for name, pair in factors(model).items():
        for got, leaf in zip(pair, leaves[name]):
            assert leaf.grad.abs().max() > 1e-3
            close(got.grad, leaf.grad, atol=1e-10)


# A layer


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("r", [2, 9])
def test_a_layer_by_hand(r, conv):
    """y = W x + b + s B A dropout(x), with A (r, in) and B (out, r) for nn.Linear and Conv1D, at any rank."""
    linear, base = nn.Linear(6, 4), Conv1D(4, 6)
    base.weight.data, base.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    layer = lora.LoRALayer(base if conv else linear, r, 1.5 * r, dropout=0.4)
    nn.init.normal_(layer.lora_B)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((r, 6), (4, r))
    x = torch.randn(2, 25, 6)
    for mode in (False, True):
        torch.manual_seed(1)
        got = layer.train(mode)(x)
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.4, training=mode)  # W reads x itself
        close(got, linear(x) + 1.5 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    differ(layer(x), layer(x))


@pytest.mark.parametrize("base", [nn.Linear(64, 16), Conv1D(16, 64)])
def test_a_reset_starts_anew_and_repeats_with_its_seed(base):
    """B = 0 and A ~ U(−1/√in, 1/√in), as PEFT draws it: within the bound and close to it, mean 0, variance 1/(3 in)."""
    drawn, layer = [], lora.LoRALayer(base, 200, 1.0)
    for seed in (1, 1, 2):
        nn.init.normal_(layer.lora_B)
        lora.reset_lora(nn.Sequential(layer, base), torch.Generator().manual_seed(seed))
        a = layer.lora_A.detach().clone()
        drawn.append(a)
        assert 0.999 / 8 < a.max() <= 1 / 8 and -0.999 / 8 > a.min() >= -1 / 8
        assert abs(a.mean().item()) < 5 * math.sqrt(1 / (3 * 64) / a.numel())
        assert a.var().item() == pytest.approx(1 / (3 * 64), rel=0.03)
        assert layer.lora_B.abs().max() == 0
    assert torch.equal(drawn[0], drawn[1])
    differ(drawn[0], drawn[2])


# Targets


@pytest.mark.parametrize("target", ["query", "proj", "attn.c_attn", "wte", "lm_head", "score"])
def test_an_unknown_target_is_named_beside_what_there_is(target):
    """What is no linear module of its own, as a tied lm_head, or a head, is refused; other names are taken."""
    model = build("GPT2ForSequenceClassification" if target == "score" else "GPT2LMHeadModel")
    with pytest.raises(UserError, match=f"no linear module is named {target}; there are c_attn, c_fc, c_proj$"):
        add_lora(model, R, ALPHA, target_modules=["c_attn", target])
    assert lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match=r"^--lora-target-modules: no linear .* there are 0$"):  # no default target
        add_lora(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), R, ALPHA)
    layers = lora_layers(add_lora(model, R, ALPHA, target_modules=["c_fc", "c_proj"]))
    assert [name.rpartition(".")[2] for name in layers] == ["c_proj", "c_fc", "c_proj"] * 2


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
DEFAULTS = {family: ["query_key_value"] for family in ("GPTNeoX", "Bloom", "Falcon")}
DEFAULTS |= {"Phi3": ["qkv_proj"], "Mpt": ["Wqkv"], "ModernBert": ["Wqkv"]}


@pytest.mark.parametrize("family", DEFAULTS)
def test_default_targets_of_families(family):
    """Queries and values get adapters without being named; all-linear names every linear module but a head."""
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 20} if family == "Mpt" else SIZES
    sizes |= {"pad_token_id": 0} if family in ("Phi3", "ModernBert") else {}
    model = AutoModel.from_config(getattr(transformers, f"{family}Config")(**sizes))
    every = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last = lambda model: sorted({name.rpartition(".")[2] for name in lora_layers(model)})
    assert last(add_lora(copy.deepcopy(model), 2, 4)) == DEFAULTS[family]
    assert {*last(add_lora(model, 2, 4, target_modules=["all-linear"]))} == every > {*DEFAULTS[family]}


# On disk


def test_a_saved_adapter_is_loaded_by_us_and_by_peft(tmp_path, tiny_tokenizer, kind):
    """Over a fresh head the saved adapter gives the same logits, here and in PEFT; what PEFT saves is read here."""
    model = draw(add_lora(build(kind), 3, 4.0, dropout=0.25))  # the file has α, not α/r, which is no float
    model.config._name_or_path = "owner/name"
    save_adapter(model, tmp_path / "adapter", tiny_tokenizer)
    heads = sorted({part for name, _ in model.named_parameters() for part in HEADS.intersection(name.split("."))})
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "r": 3, "lora_alpha": 4.0, "bias": "none"}
    config |= {"task_type": "SEQ_CLS" if heads else "CAUSAL_LM", "modules_to_save": heads or None}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in ADAPTED[family(kind)]})}
    config |= {"fan_in_fan_out": "GPT2" in kind, "lora_dropout": 0.25, "inference_mode": True}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == config
    names = {"base_model.model." + re.sub("(lora_[AB])$", r"\1.weight", name) for name in models.trained_weights(model)}
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == names
    fresh = load_adapter(other_head(build(kind)), tmp_path / "adapter")
    close(logits(fresh), logits(model))
    assert {layer.dropout.p for layer in lora_layers(fresh).values()} == {0.25}
    assert set(models.trained_weights(fresh)) == set(models.trained_weights(model))
    assert all(torch.equal(new, old) for new, old in zip(fresh.parameters(), model.parameters()))
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of tensors that it misses
        theirs = peft.PeftModel.from_pretrained(other_head(build(kind)), tmp_path / "adapter").eval()
    close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path)
    close(logits(load_adapter(other_head(build(kind)), tmp_path)), logits(model))


# By name


@pytest.fixture
def adapter(tmp_path, tiny_tokenizer):
    """The folder of an adapter on base/, a GPT-2."""
    models.save_model(build("GPT2LMHeadModel"), tiny_tokenizer, tmp_path / "base")
    model, tokenizer = load_policy(str(tmp_path / "base"), CPU, 32)
    save_adapter(draw(add_lora(model, R, ALPHA)), tmp_path / "adapter", tokenizer)
    return tmp_path / "adapter"


def test_a_policy_is_loaded_by_the_name_of_its_adapter(tmp_path, tiny_tokenizer, adapter):
    """The base of adapter_config.json plus ΔW, merged, is in float32 even if the files are not, and in eval mode."""
    plain = build("GPT2LMHeadModel").bfloat16()
    models.save_model(plain, tiny_tokenizer, tmp_path / "base")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    model, _ = load_policy(str(adapter), CPU, 32)
    pairs = {n: [tensors[f"base_model.model.{n}.lora_{x}.weight"].float() for x in "AB"] for n in ADAPTED["GPT2"]}
    expected = dict(plain.float().named_parameters()) | by_hand(pairs, plain)
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        close(parameter, expected[name], atol=1e-6)
        assert parameter.requires_grad
    assert not any(module.training for module in model.modules())
    (adapter / "tokenizer_config.json").unlink()  # as in PEFT's own adapters: then the base's tokenizer is taken
    adapter.rename(tmp_path / "model")  # a run folder stands for its model/
    again, tokenizer = load_policy(str(tmp_path), CPU, 32)
    assert torch.equal(logits(again), logits(model)) and tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_rslora_has_the_scale_alpha_over_root_r(tmp_path, adapter):
    """With use_rslora, ΔW = α/√r B A: √r times that of plain LoRA."""
    plain, _ = load_policy(str(adapter), CPU, 32)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_rslora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    scaled, _ = load_policy(str(adapter), CPU, 32)
    base, _ = load_policy(str(tmp_path / "base"), CPU, 32)
    w, w_rs, w_0 = (model.transformer.h[0].attn.c_attn.weight for model in (plain, scaled, base))
    close(w_rs - w_0, math.sqrt(R) * (w - w_0), atol=1e-6)


BASES = {"GPT2Model": 1, "DistilBertModel": 10, "Roberta": 10, "DebertaV2": 1, "Bert": 10}


@pytest.mark.parametrize("base, count", BASES.items())
def test_a_reward_model_is_loaded_by_the_name_of_its_adapter(tmp_path, tiny_tokenizer, base, count):
    """The score before saving is the score after loading, with the head, and with a pooler that the base lacks."""
    models.save_model(build(base if "Model" in base else f"{base}ForMaskedLM"), tiny_tokenizer, tmp_path / "base")
    model, tokenizer = load_classifier(str(tmp_path / "base"), CPU, new_head=count)
    tokenizer.add_special_tokens({"pad_token": "<|filler|>"})  # as train_rm.py does where pad is EOS
    model.resize_token_embeddings(len(tokenizer))
    targets = ["query_proj", "value_proj"] if "Deberta" in base else None
    other_head(draw(add_lora(model.eval(), R, ALPHA, target_modules=targets)))
    save_adapter(model, tmp_path / "adapter", tokenizer)
    for name in ("adapter", "merged"):
        loaded, tokenizer = load_classifier(str(tmp_path / name), CPU)
        close(logits(loaded.eval()), logits(model))
        assert len(tokenizer) == loaded.get_input_embeddings().num_embeddings == 301
        assert loaded.config.num_labels == logits(model).shape[1] == count
        assert count == 1 or loaded.config.id2label == {i: str(i + 1) for i in range(10)}
        models.save_model(loaded, tokenizer, tmp_path / "merged")  # is a classifier's folder again


def test_policies_and_reward_models_are_not_confused(tmp_path, adapter):
    """An adapter with a head is no policy, one without is no reward model, and a head of one reward has no ratings."""
    with pytest.raises(UserError, match="no sequence classifier"):
        load_classifier(str(adapter), CPU)
    model, tokenizer = load_classifier(str(adapter), CPU, new_head=1)  # a new head can go on it
    merged = load_policy(str(adapter), CPU, 32)[0].transformer.state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.transformer.state_dict().items())
    save_adapter(add_lora(model, R, ALPHA), tmp_path / "score", tokenizer)
    for load in (lambda name: load_policy(name, CPU, 32), lambda name: load_classifier(name, CPU, new_head=10)):
        with pytest.raises(UserError, match=r"score\.weight \(1, 16\) does not fit"):
            load(str(tmp_path / "score"))


def test_an_adapter_trained_on_an_adapter_is_loaded_on_both(tmp_path, adapter):
    """Its base is the first adapter, merged; with the first base alone the logits would be others."""
    model, tokenizer = load_policy(str(adapter), CPU, 32)
    save_adapter(draw(add_lora(model, R, ALPHA), seed=2), tmp_path / "second", tokenizer)
    close(logits(load_policy(str(tmp_path / "second"), CPU, 32)[0]), logits(model))


@pytest.mark.parametrize("config, tensors, fragment", [
    ({"peft_type": "LOHA"}, {}, "LOHA.* is not supported"),
    ({"bias": "all"}, {}, "bias.*all.* is not supported"),
    ({"use_dora": True}, {}, "use_dora.* is not supported"),
    ({"rank_pattern": {"c_attn": 4}}, {}, "rank_pattern.* is not supported"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights.* is not supported"),  # trains on another W
    ({"base_model_name_or_path": None}, {}, "names no base_model_name_or_path"),
    ({"lora_alpha": None}, {}, "attn does not fit"),
    ({}, {"h.7.attn.lora_A.weight": (3, 16)}, r"h\.7\.attn does not fit"),
    ({}, {"transformer.h.0.attn.c_attn.lora_A.weight": (3, 7)}, "c_attn does not fit"),
    ({}, {"transformer.h.0.attn.c_attn.lora_B.weight": (1, 3)}, "c_attn does not fit"),
    ({}, {"transformer.h.0.attn.c_attn.lora_A.weight": None}, r"lora_B\.weight \(48, 3\) does not fit"),
    ({}, {"transformer.wte.weight": (299, 16), "lm_head.weight": (299, 16)}, r"\(299, 16\) does not fit"),
    ({}, {"lm_head.weight": (300, 16)}, "lm_head"),  # which the base ties to its embedding
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_line(adapter, config, tensors, fragment):
    """What cannot be loaded right is refused by the folder's name and never left out in silence."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | config
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shapes = {f"base_model.model.{name}": shape for name, shape in tensors.items()}
    tensors = load_file(adapter / "adapter_model.safetensors") | {n: s and torch.ones(s) for n, s in shapes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, adapter / "adapter_model.safetensors")
    refused(adapter, fragment)


def test_missing_files_of_an_adapter_are_one_line(tmp_path, adapter):
    """A base that is gone, weights that are damaged or missing, and a config that is no object are named."""
    (tmp_path / "base").rename(tmp_path / "moved")
    refused(adapter, f" is an adapter on {tmp_path}/base: no such folder")
    (tmp_path / "moved").rename(tmp_path / "base")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(adapter, ": adapter_model.safetensors cannot be read")
    weights.unlink()
    refused(adapter, ": adapter_model.safetensors cannot be read: No such")
    for content in ("", "{", "[]"):
        (adapter / "adapter_config.json").write_text(content)
        refused(adapter, r"adapter_config\.json cannot be read")


# WARP


@pytest.mark.parametrize("count", [1, 2, 7])
@policies
def test_a_sum_of_adapters_is_one_adapter(tmp_path, tiny_tokenizer, kind, count):
    """Σ c_m s B_m A_m is [c_1 s B_1, ...] [A_1; ...], so rank M·r gives it back, also where that exceeds W's."""
    adapters = [factors(adapted(kind, seed=m + 2)) for m in range(count)]
    plain, model, joint = build(kind), adapted(kind), {}  # model: of another ΔW, which must be forgotten
    for name in adapters[0]:
        many_a, many_b = zip(*(pairs[name] for pairs in adapters))
        many_b = [(0.02 + 0.01 * m) * S * b for m, b in enumerate(many_b)]
        joint[name] = torch.cat(many_a).detach(), torch.cat(many_b, dim=1).detach()
        model.get_parameter(f"{name}.weight").data += 1.0  # and of another W
    end = by_hand(joint, plain, s=1.0)
    start = {name: plain.get_parameter(name).detach() for name in end}
    lora.set_adapters(model, start, end, R * count)
    for name, (a, b) in factors(model).items():
        many_a, many_b = joint[name]
        assert (a.shape, b.shape) == (many_a.shape, many_b.shape)
        assert torch.equal(model.get_submodule(name).weight, start[f"{name}.weight"])
        close(b @ a, many_b @ many_a, atol=1e-6)
        close(a @ a.T, b.T @ b)  # both √Σ: neither factor is larger
        assert a.requires_grad and b.requires_grad
    save_adapter(model, tmp_path, tiny_tokenizer)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (R * count, R * count)
    close(logits(load_adapter(build(kind), tmp_path)), logits(plain, end))
    differ(logits(plain, end), logits(plain))
    lora.set_adapters(model, start, end, 2)  # too low a rank: Eckart–Young leaves the singular values from the third on
    for name, weight in dense_weights(model).items():
        singular = torch.linalg.svdvals((end[name] - start[name]).double())
        assert (end[name] - weight).norm().item() == pytest.approx(singular[2:].norm().item(), rel=1e-4)

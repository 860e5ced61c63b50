"""Models and tokenizers by name, and weights as dictionaries."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTBigCodeConfig,
    RobertaConfig,
)
from transformers import PreTrainedTokenizerFast as Fast

from rlhf_min.reward_model import load_classifier
from rlhf_min.rollout import load_policy
from rlhf_min.support import models
from rlhf_min.support.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, tiny_policy, tiny_tokenizer):
    """The tiny policy, saved."""
    models.save_model(tiny_policy, tiny_tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


def word_tokenizer(size=50, **special):
    """A word-level tokenizer of `size` words with the given special tokens, and no others."""
    vocab = {f"w{i}": i for i in range(size)}
    return Fast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), **special)


def refused(name, fragment, load=lambda name: load_policy(name, CPU, 32)):
    """Assert that loading this model is an error of one line, which begins with its name."""
    with pytest.raises(UserError, match=f"^{re.escape(str(name))}.*{fragment}") as error:
        load(str(name))
    assert "\n" not in str(error.value)


# Loading and saving


def test_save_and_load_round_trip(folder, tiny_policy, tiny_tokenizer):
    """Transformers and load_policy read what save_model writes: same logits, same tokens, EOS and pad still two."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The film was great.")["input_ids"]])
    assert ids.tolist()[0] == tiny_tokenizer("The film was great.")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    ours, _ = load_policy(str(folder), CPU, 32)
    assert not any(module.training for module in ours.modules())  # no dropout
    with torch.no_grad():
        expected = tiny_policy(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=0, atol=1e-5)  # its GELU is one kernel


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path, tiny_policy, tiny_tokenizer):
    """Transformers 5 would keep a checkpoint's bfloat16; both of our loaders make every parameter float32."""
    models.save_model(copy.deepcopy(tiny_policy).to(torch.bfloat16), tiny_tokenizer, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    for model, _ in (load_policy(str(tmp_path), CPU, 32), load_classifier(str(tmp_path), CPU, new_head=1)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_folder_stands_for_its_model(tmp_path, tiny_policy, tiny_tokenizer):
    """The name of a run's folder means its model/; an existing folder without a model is refused."""
    models.save_model(tiny_policy, tiny_tokenizer, tmp_path / "run" / "model")
    assert models.find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    model, _ = load_policy(str(tmp_path / "run"), CPU, 32)
    assert torch.equal(model.transformer.wte.weight, tiny_policy.transformer.wte.weight)
    refused(tmp_path, r"no config\.json in it or in its model/")


class Hub:
    """A class like AutoTokenizer whose models are in no cache, but on the hub."""

    @staticmethod
    def from_pretrained(name, local_files_only=False, **kwargs):
        if local_files_only:
            raise OSError("not in the cache")
        return name, kwargs


def test_a_hub_name_is_loaded_where_the_hub_answers(monkeypatch):
    """Only owner/name comes from the hub, without running its code; the hub's failure is one line with the name."""
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name, timeout: asked.append((name, timeout)))
    loaded = models.from_pretrained(Hub, "owner/name", dtype=torch.float32)
    assert loaded == ("owner/name", {"trust_remote_code": False, "dtype": torch.float32})
    assert asked == [("owner/name", 5)]
    for name in ("runs/rm", "./nothing", "/nothing/at/all", "~/model", "nothing", "a/b/c"):
        refused(name, "no such folder", lambda name: models.from_pretrained(Hub, name))
    assert len(asked) == 1
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, timeout: Path("no\nfile").read_text())
    refused("owner/name", "the hub.*: .*No such file or directory", lambda name: models.from_pretrained(Hub, name))


def test_broken_files_and_pickles_are_refused(folder, tiny_policy):
    """Damaged weights and configs cannot be loaded, and a pickle is never read: it could run any program."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(folder, "cannot be loaded")
    file.unlink()
    torch.save(tiny_policy.state_dict(), folder / "pytorch_model.bin")
    refused(folder, "cannot be loaded")
    for content in ("", "{", "[]", '{"model_type": "no_such_type"}', "{}"):
        (folder / "config.json").write_text(content)
        refused(folder, "cannot be loaded")


def test_a_tokenizer_must_fit_and_have_an_eos_token(tmp_path, tiny_policy):
    """Without EOS no answer could end; a missing pad token becomes EOS; the model must embed every token."""
    models.save_model(tiny_policy, word_tokenizer(), tmp_path)
    refused(tmp_path, "neither a pad nor an EOS token")
    word_tokenizer(pad_token="w1").save_pretrained(tmp_path)
    refused(tmp_path, "no EOS token")
    word_tokenizer(301, eos_token="w0").save_pretrained(tmp_path)
    refused(tmp_path, "301 tokens, its model embeds 300")
    word_tokenizer(299, eos_token="w1").save_pretrained(tmp_path)
    model, tokenizer = load_policy(str(tmp_path), CPU, 32)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.generation_config.pad_token_id == 1


def test_max_length_beyond_the_context_is_refused(folder, tiny_policy):
    """A sequence longer than the model has positions for is refused with both numbers; the full context is fine."""
    assert models.context_length(tiny_policy) == 64
    assert models.context_length(SimpleNamespace(config=GPTBigCodeConfig(n_positions=32))) == 32  # under another name
    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert models.context_length(SimpleNamespace(config=roberta)) == 512
    refused(folder, "reads at most 64 tokens; lower --max-length 65", lambda name: load_policy(name, CPU, 65))
    load_policy(str(folder), CPU, 64)


@pytest.mark.parametrize("listed, expected", [([1, 2], [0, 1, 2]), (2, [0, 2]), (0, [0]), (None, [0])])
def test_all_eos_tokens_of_the_generation_config_count(tmp_path, tiny_policy, tiny_tokenizer, listed, expected):
    """An answer ends with the tokenizer's EOS or with any id that the saved generation config lists."""
    tiny_policy.generation_config.eos_token_id = listed
    models.save_model(tiny_policy, tiny_tokenizer, tmp_path)
    config = load_policy(str(tmp_path), CPU, 32)[0].generation_config
    assert (config.eos_token_id, config.pad_token_id) == (expected, 1)


# Weights


def test_get_weights_is_a_copy_of_every_parameter_once(tiny_policy):
    """A tied tensor appears once, no buffer and no frozen weight does; no later step changes the copy."""
    before = models.get_weights(tiny_policy)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    assert "lm_head.weight" not in before
    assert list(before) == [name for name, _ in tiny_policy.named_parameters()]
    assert not any(tensor.requires_grad for tensor in before.values())
    with torch.no_grad():
        for parameter in tiny_policy.parameters():
            parameter.add_(1.0)
    live = models.trained_weights(tiny_policy)
    assert live["transformer.wte.weight"] is tiny_policy.transformer.wte.weight
    for name, tensor in kept.items():
        assert torch.equal(before[name], tensor) and torch.equal(live[name], tensor + 1.0)
    tiny_policy.transformer.wpe.weight.requires_grad = False
    assert set(before) - set(models.get_weights(tiny_policy)) == {"transformer.wpe.weight"}


def test_set_weights_round_trip(tiny_policy):
    """set_weights(get_weights) restores the model to the bit, its tied head too, and keeps the dictionary."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits, weights = tiny_policy(input_ids=ids).logits, models.get_weights(tiny_policy)
        models.set_weights(tiny_policy, {name: torch.zeros_like(w) for name, w in weights.items()})
        assert tiny_policy(input_ids=ids).logits.abs().max() == 0
        models.set_weights(tiny_policy, weights)
        assert torch.equal(tiny_policy(input_ids=ids).logits, logits)
        assert tiny_policy.lm_head.weight is tiny_policy.transformer.wte.weight
        tiny_policy.transformer.wte.weight.zero_()
    assert weights["transformer.wte.weight"].abs().max() > 0


def test_gradient_checkpointing_in_eval_mode(tiny_policy):
    """Each block computes twice where gradients are needed, once where they are not; the gradients are the same."""
    tokens, calls = torch.tensor([[3, 4, 5, 6]]), []
    gradients = lambda: torch.autograd.grad(tiny_policy(tokens).logits.square().mean(), [*tiny_policy.parameters()])
    expected, mlp = gradients(), tiny_policy.transformer.h[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(mlp.training))
    models.checkpoint_gradients(tiny_policy)
    for a, b in zip(gradients(), expected, strict=True):
        assert torch.equal(a, b)
    assert calls == [False, False]  # and no dropout
    with torch.no_grad():
        cache = tiny_policy(tokens, use_cache=True).past_key_values
    assert len(calls) == 3 and cache.get_seq_length() == 4

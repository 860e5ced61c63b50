"""Models and tokenizers by name, and weights as a dictionary {name: tensor}.

A name is a run folder of ours, a folder in transformers' format, an adapter's folder in PEFT's format, or a hub name
owner/name. Everything is loaded in float32 (transformers would keep a checkpoint's own bfloat16, in which small updates
vanish), from safetensors only.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.utils import logging

from .errors import UserError, first_line
from .files import whole
from .lora import is_head, load_adapter, lora_layers, merge_lora
from .model_files import (
    check_ends,
    check_judge_config,
    check_policy_config,
    eos_of_config,
    head_labels,
    head_size,
    is_classifier,
    lacking,
    no_tokenizer,
    not_finite,
)
from .sources import base_of, check_on_hub, find_model, is_adapter

logging.set_verbosity_error()  # e.g. the long report that a classifier's head is new, which train_rm says in one line
logging.disable_progress_bar()


def _load(auto_class, name, **kwargs):
    source = find_model(name)
    try:
        return auto_class.from_pretrained(source, local_files_only=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # unreadable files raise a dozen kinds of exception, from OSError to RuntimeError
        if Path(source).exists():
            raise UserError(f"{name} cannot be loaded: {first_line(error)}") from None
    check_on_hub(name)
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded from the hub: {first_line(error)}") from None


def load_tokenizer(name):
    """The tokenizer beside a model. It must have an EOS or a pad token; a missing pad token becomes EOS."""
    folder = find_model(name)
    if is_adapter(folder) and not Path(folder, "tokenizer_config.json").is_file():
        return load_tokenizer(base_of(folder))
    tokenizer = _load(AutoTokenizer, name)
    if not tokenizer.vocab_size:  # transformers makes one of nothing
        raise no_tokenizer(name)
    check_ends(name, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here goes by position, never by id
    return tokenizer


def load_policy(name, device, max_length):
    """(model, tokenizer) of a causal language model, in float32 and in eval mode, which it never leaves: no dropout.

    UserError where it cannot read `max_length` tokens, or where model and tokenizer do not match.
    """
    tokenizer = load_tokenizer(name)
    check_ends(name, tokenizer, policy=True)
    model = _load_weights(AutoModelForCausalLM, name, tokenizer)
    _check_match(name, model, tokenizer)
    lengths = {"max_position_embeddings": context_length(model)}  # whatever the architecture calls it
    check_policy_config(name, model.config.to_dict() | lengths, max_length)
    eos_token_ids(model, tokenizer)  # UserError for an odd generation config
    return model.to(device).eval(), tokenizer


def _load_weights(auto_class, name, tokenizer, **config):
    source = find_model(name)
    if is_adapter(source):
        return _load_adapted(auto_class, source, tokenizer, **config)
    model, info = _load(auto_class, name, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                        ignore_mismatched_sizes=True, **config)  # fmt: skip
    absent = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    if config or not is_classifier(model.config.to_dict()):  # the head may be new
        absent = {key for key in absent if not is_head(key)}
    if absent:  # transformers would draw them at random, with a warning
        raise lacking(name, absent)
    for block in model.modules():  # GPT-2's activation in one kernel instead of eight: the same function
        if isinstance(getattr(block, "act", None), NewGELUActivation):
            block.act = nn.GELU(approximate="tanh")
    return model


def _check_match(name, model, tokenizer):
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise not_finite(name, key)
    embedded = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embedded:
        raise UserError(f"{name}: its tokenizer has {len(tokenizer)} tokens, its model embeds {embedded}: no match")


def _load_adapted(auto_class, adapter, tokenizer, **config):
    """The base of an adapter with the adapter merged into it."""
    head = head_size(adapter)
    if head and not config:
        config = head_labels(head)
    model = _load_weights(auto_class, base_of(adapter), tokenizer, **config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # train_rm.py may have added a pad token
        model.resize_token_embeddings(len(tokenizer))
    if head:
        model.config.architectures = [type(model).__name__]
    merge_lora(load_adapter(model, adapter))
    model.config._name_or_path = str(adapter)  # what an adapter on top of this one is trained on
    return model


def context_length(model):
    """The longest sequence that the model has positions for."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def load_classifier(name, device, new_head=0):
    """(model, tokenizer) of a sequence classifier in float32, whose label is one reward, or whose labels are ratings.

    With `new_head` = 1 or K any model will do, and gets such a head. Otherwise UserError for what is no reward model.
    """
    tokenizer = load_tokenizer(name)
    config = head_labels(new_head) if new_head else {}
    model = _load_weights(AutoModelForSequenceClassification, name, tokenizer, **config)
    if not new_head:
        check_judge_config(name, model.config.to_dict())
    _check_match(name, model, tokenizer)
    return model.to(device), tokenizer


def eos_token_ids(model, tokenizer):
    """All ids that end an answer: the generation config may list several (stories260K ends a story with id 1)."""
    ids = eos_of_config(model.name_or_path, getattr(model.generation_config, "eos_token_id", None))
    return sorted({tokenizer.eos_token_id, *ids})


def save_model(model, tokenizer, folder):
    """Write what transformers reads: config, safetensors, tokenizer."""
    with whole(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def trained_weights(model):
    """The live parameters that are trained, {name: tensor}: a tied tensor once, no buffers, no frozen weights."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def get_weights(model):
    """A copy of trained_weights, which no later step changes."""
    return {name: parameter.detach().clone() for name, parameter in trained_weights(model).items()}


@torch.no_grad()
def dense_weights(model):
    """A copy of the weights that training moves, as dense matrices: W + ΔW of each adapted module, or get_weights."""
    layers = lora_layers(model)
    return {f"{name}.weight": layer.weight + layer.delta() for name, layer in layers.items()} or get_weights(model)


@torch.no_grad()
def set_weights(model, weights):
    """Copy {name: tensor} into the model's parameters; the dictionary stays its own."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)

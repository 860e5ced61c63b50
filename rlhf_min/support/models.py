"""Models and tokenizers by name, and weights as a dictionary {name: tensor}.

A name is a run folder of ours, a folder in transformers' format, an adapter's folder in PEFT's format, or a hub name
owner/name. Everything is loaded in float32 (transformers would keep a checkpoint's own bfloat16, in which small updates
vanish), from safetensors only, and no code that a model brings along is run.
"""

import inspect
import os
from pathlib import Path

import huggingface_hub
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .errors import UserError, first_line
from .files import read_json, whole

HEADS = ("score", "classifier", "pre_classifier", "pooler")  # what a classifier has on top of its backbone

logging.set_verbosity_error()  # e.g. the long report that a classifier's head is new, which train_rm says in one line
logging.disable_progress_bar()


def is_adapter(folder):
    """Whether a folder holds an adapter in PEFT's format, and no model."""
    return os.path.isfile(Path(folder, "adapter_config.json")) and not os.path.isfile(Path(folder, "config.json"))


def is_head(name):
    """Whether a parameter belongs to what a classifier has on top of its backbone."""
    return any(part in HEADS for part in name.split("."))


def find_model(name):
    """The folder of a model (for a run folder its model/), or the hub name itself where there is no such folder."""
    for folder in (Path(name, "model"), Path(name)):
        if os.path.isfile(folder / "config.json") or is_adapter(folder):
            return str(folder)
    if os.path.exists(name):
        raise UserError(f"{name}: no config.json in it or in its model/; name a finished run or a transformers folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~", "runs/")):
        raise UserError(f"{name}: no such folder; name a run folder, a transformers folder or a hub name owner/name")
    return name


def base_of(adapter):
    """The name of the model that an adapter's folder says it was trained on."""
    base = read_json(Path(adapter, "adapter_config.json")).get("base_model_name_or_path")
    if not isinstance(base, str) or base == str(adapter):
        raise UserError(f"{adapter}: its adapter_config.json names no base_model_name_or_path")
    try:
        return find_model(base)
    except UserError as error:
        raise UserError(f"{adapter} is an adapter on {error}, or run where {base} is") from None


def from_pretrained(auto_class, name, **kwargs):
    """auto_class.from_pretrained of a folder, of the hub's cache, or of the hub; UserError where that fails."""
    source = find_model(name)
    try:
        return auto_class.from_pretrained(source, local_files_only=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # unreadable files raise a dozen kinds of exception, from OSError to RuntimeError
        if Path(source).exists():
            library = any(word in str(error) for word in ("sentencepiece", "SentencePiece", "tiktoken", "protobuf"))
            why = "pip install sentencepiece protobuf" if library else first_line(error)
            raise UserError(f"{name} cannot be loaded: {why}") from None
    try:
        huggingface_hub.HfApi().model_info(source, timeout=5)  # from_pretrained would retry for half a minute
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception as error:
        raise UserError(f"{name}: no such folder, nor in the hub's cache; the hub: {first_line(error)}") from None


def load_tokenizer(name):
    """The tokenizer beside a model, or beside an adapter's base. A missing pad token becomes EOS."""
    folder = find_model(name)
    if is_adapter(folder) and not Path(folder, "tokenizer_config.json").is_file():
        return load_tokenizer(base_of(folder))
    tokenizer = from_pretrained(AutoTokenizer, name)
    if not tokenizer.vocab_size:  # transformers makes one of nothing
        raise UserError(f"{name}: no tokenizer in it, such as tokenizer.json; save the model's own beside it")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has neither a pad nor an EOS token; set one in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here goes by position, never by id
    return tokenizer


def load_plain_model(auto_class, name, **config):
    """A model in float32, no adapter; `config` with the labels of a new head, where it gets one.

    UserError where tensors are missing, which transformers would draw at random.
    """
    model, info = from_pretrained(auto_class, name, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                                  ignore_mismatched_sizes=True, **config)  # fmt: skip
    if any("v_head" in key for key in info["unexpected_keys"]):
        raise UserError(f"{name}: it has a value head v_head, as TRL's PPO saved it, which is not read")
    absent = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    if config or not is_classifier(model):  # the head may be new
        absent = {key for key in absent if not is_head(key)}
    if absent:
        raise UserError(f"{name}: its weights lack {len(absent)} tensors, such as {min(absent)}, or have other shapes")
    for block in model.modules():  # GPT-2's activation in one kernel instead of eight: the same function
        if isinstance(getattr(block, "act", None), NewGELUActivation):
            block.act = nn.GELU(approximate="tanh")
    return model


def head_labels(count):
    """What config.json calls the labels of a head of `count` logits: a reward has no name, ratings are "1", "2", ..."""
    ratings = {i: str(i + 1) for i in range(count)}
    return {"num_labels": 1} if count == 1 else {"id2label": ratings, "label2id": {v: k for k, v in ratings.items()}}


def is_classifier(model):
    """Whether a model was saved as a sequence classifier."""
    return "SequenceClassification" in str(model.config.architectures)


def check_loaded(name, model, tokenizer, logits):
    """UserError where a weight is not finite, the tokenizer has more tokens than the model embeds, or padding is read.

    logits: what gives B lists of token ids their logits (B, n), in one padded batch.
    """
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name}: {key} is not finite; save the model again")
    embedded = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embedded:
        raise UserError(f"{name}: its tokenizer has {len(tokenizer)} tokens, its model embeds {embedded}: no match")
    short = (tokenizer("The film was")["input_ids"] or [0])[:4]
    try:
        with torch.no_grad():
            alone, padded = logits([short]), logits([short * 2, short])[1:]  # (1, n) × 2
        difference, size = (logits.nan_to_num().abs().max() for logits in (alone - padded, padded))
        why = "" if difference <= 1e-3 * size else "it reads padding"
    except Exception as error:  # of this family's own code
        why = f"they fail on a padded one: {first_line(error)}"
    if why:
        raise UserError(f"{name}: models of type {model.config.model_type} cannot be used, in batches: {why}")


def context_length(model):
    """The longest sequence that the model has positions for."""
    length = getattr(model.config, "max_position_embeddings", None) or -1
    if "roberta" in model.config.model_type:  # its positions begin behind that of padding
        length -= model.config.pad_token_id + 1
    return length if length > 0 else 10**9


def cache_argument(model):
    """What forward calls the cache of keys and values; None for a model that has a state instead, such as Mamba."""
    arguments = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # the latter before transformers 5.24
    return None if model._is_stateful or name not in arguments else name


def checkpoint_gradients(model):
    """Let the blocks of a model in eval mode compute their activations a second time, when gradients need them.

    transformers does so for blocks in training mode, and has then no cache. So only the blocks are in training mode,
    not what is in them, such as dropout, and only while gradients are recorded.
    """
    # the latter name is that before transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def switch(*_):
        for block in blocks:
            block.training = torch.is_grad_enabled()

    model.register_forward_pre_hook(switch)


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
def set_weights(model, weights):
    """Copy {name: tensor} into the model's parameters; the dictionary stays its own."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)

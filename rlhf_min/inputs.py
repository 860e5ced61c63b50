"""Reading what the options of the scripts that sample a policy name."""

import torch

from . import toy
from .batches import shuffle
from .data import hold_out_of, without
from .evaluation import load_judges
from .lora import add_lora_of
from .models import load_policy


def load_inputs(options, device):
    """(policy, tokenizer, judges, training prompts, held-out prompts); `judges["reward"]` is the reward model."""
    if options.prompts == toy.PROMPTS:
        options.judges = options.judges or toy.JUDGES
    policy, tokenizer = load_policy(options.policy, device, options.max_length)
    judges = load_judges(options.judge_specs(), device)
    prompts, eval_prompts = options.load_prompts(tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    prompts, eval_prompts = split_prompts(prompts, eval_prompts, options.num_eval_prompts, generator)
    torch.manual_seed(options.seed)
    add_lora_of(policy, options)
    return policy, tokenizer, judges, prompts, eval_prompts


def split_prompts(prompts, eval_prompts, count, generator):
    """(training, held-out) prompts, none in both: `count` of `eval_prompts` if there are any, else of `prompts`."""
    held_out = shuffle(hold_out_of(prompts, eval_prompts, count), generator)[:count]
    return without(prompts, held_out), held_out

"""Reading what the options of the scripts that sample a policy name."""

import torch

from . import toy
from .batches import shuffle
from .data import load_prompts, without
from .errors import UserError
from .evaluation import load_judges
from .lora import add_chosen_lora
from .models import load_policy


def load_inputs(options, device):
    """(policy, tokenizer, judges, training prompts, held-out prompts); `judges["reward"]` is the reward model."""
    if options.prompts == toy.PROMPTS:
        options.judges = options.judges or toy.JUDGES
    policy, tokenizer = load_policy(options.policy, device, options.max_length)
    judges = load_judges([f"reward={options.reward_model}", *options.judges], device)
    prompts, eval_prompts = (prompts_of(file, tokenizer, options) for file in options.prompt_files())
    generator = torch.Generator().manual_seed(options.seed)
    prompts, eval_prompts = split_prompts(prompts, eval_prompts, options.num_eval_prompts, generator)
    torch.manual_seed(options.seed)
    add_chosen_lora(policy, options)
    return policy, tokenizer, judges, prompts, eval_prompts


def prompts_of(source, tokenizer, options):
    """The prompts of a file within the limits of `options`; none without a file."""
    limits = options.prompt_tokens, options.max_length, options.max_prompt_characters
    return load_prompts(source, tokenizer, *limits) if source else []


def split_prompts(prompts, eval_prompts, count, generator):
    """(training, held-out) prompts, none in both: `count` of `eval_prompts` if there are any, else of `prompts`."""
    held_out = shuffle(without(eval_prompts, prompts) if eval_prompts else prompts, generator)[:count]
    training = without(prompts, held_out)
    if len(held_out) < count or not training:
        count_all = len(prompts) + len(without(eval_prompts, prompts))
        raise UserError(f"{count_all} distinct prompts are too few to hold out {count} of them; "
                        "lower --num-eval-prompts or give more")  # fmt: skip
    return training, held_out

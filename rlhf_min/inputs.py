"""What the scripts that sample a policy have in common: their options, and reading what these name."""

from dataclasses import dataclass

import torch

from . import toy
from .data import load_prompts, split_prompts
from .evaluation import load_judges
from .lora import LoRAOptions, add_chosen_lora
from .models import load_policy
from .options import RunOptions, option


@dataclass
class SamplingOptions(RunOptions):
    """Prompts, judges, and how answers are drawn."""

    prompts: str = option(toy.PROMPTS, "lines with 'prompt', or with 'text', whose first tokens are the prompt")
    prompt_tokens: int = option(10, "tokens of a 'text' that make a prompt", low=1)
    max_prompt_characters: int = option(0, "leave out longer prompts; 0 keeps all", low=0)
    judges: list = option([], "name=spec, spec a reward model or package.module.function, to judge the answers "
                              "(the embedded world brings its own)")  # fmt: skip
    temperature: float = option(0.7, "of sampling and scoring: it belongs to the policy", low=0.01)
    max_length: int = option(64, "tokens of prompt and answer", low=2)
    batch_size: int = option(64, "answers at a time", low=1)
    seed: int = option(42, "seed of prompts and samples", low=0, high=2**31 - 1)


@dataclass
class PolicyOptions(SamplingOptions, LoRAOptions):
    """What trains a policy."""

    policy: str = option(toy.POLICY, "π_sft: a run folder, a transformers folder, an adapter or a hub name")
    reward_model: str = option(toy.REWARD_MODEL, "a reward model of either head, or package.module.function")
    eval_prompts: str = option("", "prompts of the evaluation (default: some of --prompts are held out)")
    num_eval_prompts: int = option(256, "how many prompts of the evaluation", low=3)
    steps: int = option(100, "T: optimizer steps, of each policy", low=1)
    lr: float = option(1e-4, "AdamW learning rate", low=0)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", low=0)


def read_prompts(source, tokenizer, options):
    """The prompts of a file within the limits of `options`; none without a file."""
    limits = options.prompt_tokens, options.max_length, options.max_prompt_characters
    return load_prompts(source, tokenizer, *limits) if source else []


def load_inputs(options, device):
    """(policy, tokenizer, judges, training prompts, held-out prompts); `judges["reward"]` is the reward model."""
    if options.prompts == toy.PROMPTS:
        options.judges = options.judges or toy.JUDGES
    policy, tokenizer = load_policy(options.policy, device, options.max_length)
    judges = load_judges([f"reward={options.reward_model}", *options.judges], device)
    prompts, eval_prompts = (read_prompts(file, tokenizer, options) for file in (options.prompts, options.eval_prompts))
    generator = torch.Generator().manual_seed(options.seed)
    prompts, eval_prompts = split_prompts(prompts, eval_prompts, options.num_eval_prompts, generator)
    torch.manual_seed(options.seed)
    add_chosen_lora(policy, options)
    return policy, tokenizer, judges, prompts, eval_prompts

"""Exercise 15: find the bug. Check it with  python exercises/check.py 15

Ten short functions, and each has one wrong line. None of them raises an error: the training goes on, only worse, or a
table of results is wrong. You can trust the docstrings, and the names: a value should be what its name says. The lines
of a function carry numbers. Put the number of the wrong line in place of each 0 in ANSWERS, at the end.
"""

import math

import torch


def positions(attention_mask):
    """The place of each token in its text: 0, 1, 2, ... from the first real token on. Padding stands on the left.

    attention_mask: bool (B, P), True on real tokens. Returns (B, P); on padding the value does not matter.
    """
    counted = torch.ones_like(attention_mask, dtype=torch.long)  # 1: what is counted, 1 or 0
    tokens_so_far = counted.cumsum(-1)  # 2: this token included
    place = tokens_so_far - 1  # 3
    return place.clamp(min=0)  # 4


def reward_of_answer(rewards, attention_mask):
    """A reward model gives a number at every token. The number at the last real token is the answer's reward.

    rewards: (B, T); attention_mask: bool (B, T), True on real tokens. Padding stands on the right. Returns (B,).
    """
    rows = torch.arange(len(rewards))  # 1
    last = torch.full_like(rows, rewards.shape[1] - 1)  # 2
    return rewards[rows, last]  # 3


def sample_and_score(logits, temperature, uniform):
    """Draw a token from the policy π = softmax(logits / temperature). Returns (token, log π(token)).

    logits: (V,); uniform: a tensor (1,) with a random number in [0, 1).
    """
    probs = (logits / temperature).softmax(-1)  # 1
    cumulative = probs.cumsum(-1)  # 2
    token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(logits) - 1)  # 3: where the sum passes it
    logprob = logits.log_softmax(-1)[token]  # 4
    return token, logprob  # 5


def kl_of_next_token(logits, ref_logits):
    """KL(π ‖ π_ref) = Σ_v π(v) [log π(v) − log π_ref(v)] of the next token, exactly. (B, V), (B, V) → (B,)"""
    logp = logits.log_softmax(-1)  # 1
    ref_logp = ref_logits.log_softmax(-1)  # 2
    weights = ref_logp.exp()  # 3: the distribution that the expectation is taken over
    return (weights * (logp - ref_logp)).sum(-1)  # 4


def rewards_by_prompt(prompts, k, answer, reward):
    """Answer each prompt k times. The k answers to a prompt stand next to each other, as the rows of the table need it.

    answer(prompt) and reward(prompt, answer) are functions. Returns (P, k): a row of k rewards for each prompt.
    """
    batch = [prompt for _ in range(k) for prompt in prompts]  # 1
    answers = [answer(prompt) for prompt in batch]  # 2
    rewards = [reward(prompt, text) for prompt, text in zip(batch, answers)]  # 3
    return torch.tensor(rewards).view(len(prompts), k)  # 4


def clip_gradients(gradients, max_norm):
    """Shorten all gradients by one factor, so that together they have at most the norm max_norm.

    gradients: a list of tensors. Returns such a list. A gradient that is short enough stays as it is.
    """
    squares = [(gradient**2).sum() for gradient in gradients]  # 1
    norm = torch.stack(squares).sum().sqrt()  # 2
    factor = max_norm / norm  # 3
    return [factor * gradient for gradient in gradients]  # 4


def new_adapter(n_in, n_out, r):
    """(A, B) of a new LoRA adapter: A (r, n_in) at random, B (n_out, r). At first it changes nothing: B A = 0."""
    bound = 1 / math.sqrt(n_in)  # 1
    A = (2 * torch.rand(r, n_in) - 1) * bound  # 2: uniform in (−bound, bound)
    B = (2 * torch.rand(n_out, r) - 1) * bound  # 3
    return A, B  # 4


def front(sft, merged, etas):
    """The policies (1−η) θ_sft + η θ_merged for each η. sft, merged: (n,); etas: numbers. Returns a list of (n,)."""
    points = []  # 1
    theta = sft  # 2
    for eta in etas:  # 3
        theta = (1 - eta) * theta + eta * merged  # 4
        points.append(theta)  # 5
    return points  # 6


def split_pairs(pairs, n):
    """(training, held-out) pairs. No prompt is in both. pairs: a list of dictionaries with a `prompt`."""
    held_out_prompts = {pair["prompt"] for pair in pairs[:n]}  # 1
    held_out = [pair for pair in pairs if pair["prompt"] in held_out_prompts]  # 2
    training = pairs[n:]  # 3
    return training, held_out  # 4


def mean_and_error(values):
    """(mean, standard error of the mean). values: a list of n ≥ 2 independent numbers."""
    n = len(values)  # 1
    mean = sum(values) / n  # 2
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)  # 3
    error = math.sqrt(variance) / n  # 4
    return mean, error  # 5


ANSWERS = {
    "positions": 0,
    "reward_of_answer": 0,
    "sample_and_score": 0,
    "kl_of_next_token": 0,
    "rewards_by_prompt": 0,
    "clip_gradients": 0,
    "new_adapter": 0,
    "front": 0,
    "split_pairs": 0,
    "mean_and_error": 0,
}

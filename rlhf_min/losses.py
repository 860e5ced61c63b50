"""Losses of the reward models: tensors in, a scalar out."""

import torch.nn.functional as F


def pairwise_loss(chosen, rejected, margin=None, center_coefficient=0.0):
    """Bradley–Terry: the better answer w shall have the higher reward.

        L = mean_B [ −log σ(r_w − r_l − margin) + c · (r_w + r_l)² ]

    The second term (c = `center_coefficient`) fixes the constant that the first leaves free: only the difference of two
    rewards enters it. Sources: Back to Basics (2402.14740) eq. 1; margin: Llama 2 (2307.09288); centering: Helping or
    Herding (2312.09244) eq. 2.

    chosen, rejected, margin: (B,), in nats. Returns a scalar. Raises ValueError for other shapes: a (B, 1) reward
    against a (B,) margin would broadcast to (B, B) without a word.
    """
    for tensor in (chosen, rejected, margin):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape != chosen.shape):
            raise ValueError(
                f"rewards and margin must all be (B,), not {tuple(chosen.shape)} and {tuple(tensor.shape)}"
            )
    difference = chosen - rejected if margin is None else chosen - rejected - margin  # (B,)
    return (-F.logsigmoid(difference) + center_coefficient * (chosen + rejected) ** 2).mean()

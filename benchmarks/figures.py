"""Draw the figures of README and tutorial that need no result files, with the functions that train.

    pip install -e '.[plots]'
    python benchmarks/figures.py               # all of them, into docs/
    python benchmarks/figures.py slerp         # one

documents.py draws the others.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from rlhf_min import losses, reinforce, warp

OUT = Path(__file__).resolve().parents[1] / "docs"


def walk(panel, start, delta, seed, color):
    """A wiggly path from `start` to `start` + `delta`: T steps of a run."""
    steps = torch.linspace(0, 1, 40)[:, None]
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)).cumsum(0) * 0.012
    path = start + steps * delta + noise - steps * noise[-1] - (1 - steps) * noise[0]
    panel.plot(*path.T, color=color, linewidth=1)


def mark(panel, point, label, offset):
    """A dot with its name."""
    panel.plot(*point, "o", color="0.2", markersize=5)
    panel.annotate(label, point, xytext=offset, textcoords="offset points")


def idea():
    """WARP in the plane: two runs, the arc between their task vectors, the interpolation."""
    figure, panel = pyplot.subplots(figsize=(6.4, 4.6))
    init, a, b = (torch.tensor(point) for point in ((0.0, 0.0), (1.0, 0.05), (0.12, 0.95)))  # θ_init, δ_1, δ_2
    arc = torch.stack([warp.slerp(a, b, lam) for lam in torch.linspace(0, 1, 50).tolist()])
    slerp, mean = warp.slerp(a, b, 0.5), torch.lerp(a, b, 0.5)
    after = 0.5 * slerp  # η = ½
    for seed, delta, color in ((1, a, "C0"), (2, b, "C2")):
        walk(panel, init, delta, seed, color)
        panel.annotate("", init + delta, init, arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.4})
    panel.plot(*arc.T, "C3--", linewidth=1)
    panel.plot(*torch.stack([a, b]).T, color="0.6", linestyle=":", linewidth=1)
    panel.plot(*torch.stack([init, slerp]).T, "C3", linewidth=2)
    mark(panel, init, "θ_init", (-46, -4))
    mark(panel, a, "θ¹", (6, 2))
    mark(panel, b, "θ²", (-4, 8))
    mark(panel, slerp, "θ_slerp", (7, 2))
    mark(panel, mean, "the mean is shorter", (-100, 8))
    mark(panel, after, "next θ_init =\n(1−η) θ_init + η θ_slerp", (10, -22))
    panel.annotate("δ_1", 0.5 * a, xytext=(0, -16), textcoords="offset points", color="C0")
    panel.annotate("δ_2", 0.5 * b, xytext=(-26, 0), textcoords="offset points", color="C2")
    panel.set(xlim=(-0.2, 1.25), ylim=(-0.15, 1.12), aspect="equal")
    panel.axis("off")
    return figure


def tensors():
    """Prompt, answer, mask, and which position scores which token."""
    figure, panel = pyplot.subplots(figsize=(7.6, 2.5))
    rows = "pad pad The film was great EOS pad".split(), "We saw it and I slept . EOS".split()
    prompt, colors = 4, {"pad": "0.92", "x": "#cfe2f3", "y": "#d9ead3"}
    for i, row in enumerate(rows):
        for j, token in enumerate(row):
            kind = "pad" if token == "pad" else "x" if j < prompt else "y"
            panel.add_patch(Rectangle((j, -i), 0.94, 0.86, color=colors[kind]))
            panel.text(j + 0.47, 0.43 - i, token, ha="center", va="center", color="0.6" if kind == "pad" else "0.1")
    panel.plot([prompt - 0.03] * 2, [-1.1, 1.0], color="0.3")
    for j in range(prompt, 7):
        panel.annotate("", (j + 0.45, 0.9), (j - 0.55, 0.9),
                       arrowprops={"arrowstyle": "->", "color": "C3", "connectionstyle": "arc3,rad=-0.5"})  # fmt: skip
    panel.text(6, 1.45, "the logits at t − 1 score token t", color="C3", ha="center")
    panel.text(2, -1.42, "prompt x (B, P)", ha="center")
    panel.text(6, -1.42, "answer y (B, T): mask is True on green", ha="center")
    panel.set(xlim=(-0.1, 8.1), ylim=(-1.6, 1.8))
    panel.axis("off")
    return figure


def bradley_terry():
    """Choices of people with Gumbel noise, and the sigmoid of the difference of utilities."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    differences, generator = torch.linspace(-4, 4, 17), torch.Generator().manual_seed(0)
    gumbel = lambda: -(-torch.rand(400, generator=generator).log()).log()
    shares = [(difference + gumbel() > gumbel()).float().mean() for difference in differences]
    panel.plot(differences, shares, "o", label="400 comparisons each")
    panel.plot(differences, differences.sigmoid(), label="σ(u_w − u_l)")
    panel.set(xlabel="difference of the utilities, u_w − u_l", ylabel="share that prefers w")
    panel.legend()
    return figure


def ties():
    """The loss of an answer against itself, from a uniform to a certain rating."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    middle = -((torch.arange(1, 11) - 5.5) ** 2)[None] / 10.0  # (1, 10)
    sharpness = torch.linspace(0, 6, 60)
    for how in ("strict", "half"):
        panel.plot(sharpness, [-losses.preference_logprob(middle * s, middle * s, how) for s in sharpness], label=how)
    panel.axhline(0.7985, color="0.7", linewidth=0.8)
    panel.set(xlabel="sharpness of the ratings (0: uniform)", ylabel="loss of an answer against itself, nats")
    panel.legend(title="ties")
    return figure


def baselines():
    """The variance of one step over the baseline b, in a world of four answers."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    pi = torch.tensor([0.5, -0.2, 0.1, 0.9]).softmax(0)  # (4,)
    reward = torch.tensor([1.0, 3.0, 0.0, 2.0])
    scores = torch.eye(4) - pi  # (4, 4) ∇ log π(y), a row for each y
    b = torch.linspace(-1, 5, 61)
    steps = (reward - b[:, None])[..., None] * scores  # (61, 4, 4)
    mean = (pi[:, None] * steps).sum(1, keepdim=True)  # (61, 1, 4) the same for every b
    panel.plot(b, (pi * (steps - mean).square().sum(-1)).sum(-1))
    panel.axvline((pi * reward).sum(), color="C3", linestyle=":", label="b = E[r]")
    panel.set(xlabel="baseline b", ylabel="variance of one step")
    panel.legend()
    return figure


def anchor():
    """A policy that moves steadily, then stops, and its EMA for three rates."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    path = torch.cat([torch.arange(101.0), torch.full((100,), 100.0)])
    panel.plot(path, color="0.2", label="θ")
    for mu in (0.01, 0.05, 0.2):
        ema, trace = {"w": path[0]}, [0.0]
        for theta in path[1:]:
            ema = warp.ema_update(ema, {"w": theta}, mu)
            trace.append(ema["w"].item())
        panel.plot(trace, label=f"θ_ema, μ = {mu:g}")
    panel.set(xlabel="step", ylabel="distance travelled")
    panel.legend()
    return figure


def slerp():
    """Length along the chord and along the arc, for three angles."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    lams, a = torch.linspace(0, 1, 41), torch.tensor([1.0, 0.0])
    for degrees, color in ((30, "C0"), (90, "C1"), (150, "C2")):
        omega = torch.tensor(degrees / 180 * torch.pi)
        b = torch.stack([omega.cos(), omega.sin()])
        means = [torch.lerp(a, b, lam.item()).norm() for lam in lams]
        panel.plot(lams, means, color, linestyle=":", label=f"mean, {degrees}°")
        panel.plot(lams, [warp.slerp(a, b, lam.item()).norm() for lam in lams], color, linewidth=1)
    panel.set(xlabel="λ", ylabel="length of the merged task vector", ylim=(0, 1.1))
    panel.text(0.3, 1.03, "SLERP, every angle")
    panel.legend()
    return figure


def estimates():
    """k1, k2 and k3 of one answer over d = log π − log π_ref."""
    figure, panel = pyplot.subplots(figsize=(4.6, 3.2))
    d = torch.linspace(-2, 3, 101)
    for kind in ("k1", "k2", "k3"):
        values = reinforce.kl_estimate(d[:, None], torch.zeros(101, 1), torch.ones(101, 1).bool(), kind)
        panel.plot(d, values, label=kind)
    panel.set(xlabel="d = log π(y) − log π_ref(y), nats", ylabel="estimate of KL(π ‖ π_ref)")
    panel.axhline(0, color="0.7", linewidth=0.8)
    panel.legend()
    return figure


FIGURES = {function.__name__: function for function in
           (idea, tensors, bradley_terry, ties, baselines, estimates, anchor, slerp)}  # fmt: skip


def main():
    for name in sys.argv[1:] or FIGURES:
        figure = FIGURES[name]()
        figure.tight_layout()
        figure.savefig(OUT / (f"{name}.png" if name == "idea" else f"tutorial_{name}.png"), dpi=130)
        pyplot.close(figure)


if __name__ == "__main__":
    main()

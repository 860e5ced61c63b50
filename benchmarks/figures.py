"""Draw docs/idea.png, the picture of WARP's idea, with the functions that train.

pip install -e '.[plots]' && python benchmarks/figures.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib import pyplot

from rlhf_min import warp

OUT = Path(__file__).resolve().parents[1] / "docs" / "idea.png"
INIT, A, B = (torch.tensor(point) for point in ((0.0, 0.0), (1.0, 0.05), (0.12, 0.95)))  # θ_init, δ_1, δ_2


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


def main():
    figure, panel = pyplot.subplots(figsize=(6.4, 4.6))
    arc = torch.stack([warp.slerp(A, B, lam) for lam in torch.linspace(0, 1, 50).tolist()])
    slerp, mean = warp.slerp(A, B, 0.5), torch.lerp(A, B, 0.5)
    after = 0.5 * slerp  # η = ½
    for seed, delta, color in ((1, A, "C0"), (2, B, "C2")):
        walk(panel, INIT, delta, seed, color)
        panel.annotate("", INIT + delta, INIT, arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.4})
    panel.plot(*arc.T, "C3--", linewidth=1)
    panel.plot(*torch.stack([A, B]).T, color="0.6", linestyle=":", linewidth=1)
    panel.plot(*torch.stack([INIT, slerp]).T, "C3", linewidth=2)
    mark(panel, INIT, "θ_init", (-46, -4))
    mark(panel, A, "θ¹", (6, 2))
    mark(panel, B, "θ²", (-4, 8))
    mark(panel, slerp, "θ_slerp", (7, 2))
    mark(panel, mean, "the mean is shorter", (-100, 8))
    mark(panel, after, "next θ_init =\n(1−η) θ_init + η θ_slerp", (10, -22))
    panel.annotate("δ_1", 0.5 * A, xytext=(0, -16), textcoords="offset points", color="C0")
    panel.annotate("δ_2", 0.5 * B, xytext=(-26, 0), textcoords="offset points", color="C2")
    panel.set(xlim=(-0.2, 1.25), ylim=(-0.15, 1.12), aspect="equal")
    panel.axis("off")
    figure.tight_layout()
    figure.savefig(OUT, dpi=130)


if __name__ == "__main__":
    main()

"""Every code block of docs/tutorial.md runs, in order."""

import contextlib
import io
import re
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"


def test_every_block_runs(in_world):
    """In the small world of the tests, with short trainings; the numbers that hold in every world come out."""
    blocks = re.findall(r"^```python\n(.*?)^```$", TUTORIAL.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for i, block in enumerate(re.sub(r"train\(steps=\d+", "train(steps=4", block) for block in blocks):
            exec(compile(block, f"{TUTORIAL.name}, block {i}", "exec"), names)
    said = out.getvalue()
    for quoted in ("0.7985", "0.6931", "2.8723", "tensor([0.6124, 0.6124, 0.5000])", "tensor([inf]", "'kl': 0.0"):
        assert quoted in said
    for line in ("k1 in the reward", "k1 as a loss is 0", "k2 as a loss", "k3 as a loss"):
        assert re.search(f"{line}.*: +True", said)

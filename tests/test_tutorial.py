"""Every code block of docs/tutorial.md runs, in order, and docs/tutorial.ipynb has the same ones."""

import contextlib
import io
import json
import re
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TUTORIAL.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_every_block_runs(in_world):
    """In the small world of the tests, with short trainings; the numbers that hold in every world come out."""
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for i, block in enumerate(re.sub(r"train\(steps=\d+", "train(steps=4", block) for block in BLOCKS):
            exec(compile(block, f"{TUTORIAL.name}, block {i}", "exec"), names)
    said = out.getvalue()
    for quoted in ("0.7985", "0.6931", "2.8723", "tensor([0.6124, 0.6124, 0.5000])", "tensor([inf]", "'kl': 0.0"):
        assert quoted in said
    assert "the KL is 0.160, the mean of k1 under top-k is 0.501" in said and "by 0.204, and moves by -0.217" in said
    for line in ("k1 in the reward", "k1 as a loss is 0", "k2 as a loss", "k3 as a loss"):
        assert re.search(f"{line}.*: +True", said)


def test_the_notebook_is_the_tutorial():
    """It was built from this text, and every cell has run. If not: pip install -e '.[notebook]', and the command."""
    notebook = json.loads(TUTORIAL.with_suffix(".ipynb").read_text("utf-8"))
    cells = {kind: [cell for cell in notebook["cells"] if cell["cell_type"] == kind] for kind in ("code", "markdown")}
    command = "jupytext --to ipynb --execute --run-path . docs/tutorial.md"
    assert ["".join(cell["source"]) + "\n" for cell in cells["code"]] == BLOCKS, command
    assert [cell["execution_count"] for cell in cells["code"]] == [*range(1, len(BLOCKS) + 1)], command
    text = TUTORIAL.read_text("utf-8")
    assert all("".join(cell["source"]) in text for cell in cells["markdown"]), command

"""benchmarks/kl.py: each form of the KL term trains from end to end; test_oracle.py has its gradient."""

import dataclasses
import json
import shutil

import pytest

from benchmarks import ablations, kl
from rlhf_min.support.errors import UserError


def test_every_form_trains(in_world, tmp_path, capsys):
    """Two steps of each, for one seed, in this process: eight rows, which are not made again."""
    for seed in (1, 2):
        shutil.copytree("runs/toy/reward_model", tmp_path / f"seed-{seed}/reward_model-train_pairs")
    flags = f"--steps 2 --batch-size 4 --num-eval-prompts 4 --max-length 14 --out {tmp_path}"
    options = kl.parse_options(kl.KlOptions, flags.split())
    for name in kl.FORMS:
        ablations.work((kl.judge_form, name, 1, options))
    files = sorted(tmp_path.glob("*-1.json"))
    assert len(files) == len(kl.FORMS) == 8
    rows = [json.loads(file.read_text("utf-8"))["rows"][0] for file in files]
    assert {row["form"] for row in rows} == {*kl.FORMS} and len({row["kl"] for row in rows}) == 7  # two are equal
    before = capsys.readouterr().out
    ablations.work((kl.judge_form, name, 1, options))
    with pytest.raises(UserError, match="was made with other options"):
        ablations.work((kl.judge_form, name, 1, dataclasses.replace(options, beta=0.2)))
    assert before.count("done") == 8 and not capsys.readouterr().out
    ablations.save_results(tmp_path / "results.json", "command", [{"commit": "x", "rows": rows}])
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results.keys() == {"command", "commits", "machine", "seeds", "rows"} and results["seeds"] == [1]

"""benchmarks/kl.py: each form of the KL term is the gradient of what its table says, and trains from end to end."""

import json
import shutil

import pytest

from benchmarks import ablations, kl
from rlhf_min.oracle import examine
from tests.test_oracle import BETA, FORMS


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_is_the_gradient_of(form):
    """In all of them the reward term climbs E[r]; only the KL term differs."""
    (loss, temperature), (_, climbs) = kl.FORMS[form], FORMS[form]
    report = examine(lambda *inputs: loss(*inputs, BETA))
    assert temperature is None and report.reward_term == {"E[r]": 1.0}
    assert report.kl_term == pytest.approx(climbs, abs=1e-6) and report.kl_term.keys() == climbs.keys()


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
    assert {row["form"] for row in rows} == {*kl.FORMS} and len({row["kl"] for row in rows}) > 5
    before = capsys.readouterr().out
    ablations.work((kl.judge_form, name, 1, options))
    assert before.count("done") == 8 and not capsys.readouterr().out
    ablations.save_results(tmp_path / "results.json", "command", [{"commit": "x", "rows": rows}])
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results.keys() == {"command", "commits", "machine", "seeds", "rows"} and results["seeds"] == [1]

"""benchmarks/kl.py: each form of the KL term is the gradient of what its table says, and trains from end to end."""

import json
import shutil

import pytest

from benchmarks import ablations, kl
from rlhf_min.oracle import examine

CLIMBED = {  # the KL term's part of the expected step, at β = .1
    "k1 in the reward, detached": {"KL(π‖ref)": -0.1},
    "k2 as a loss": {"KL(π‖ref)": -0.1},
    "k3 as a loss": {"KL(ref‖π)": -0.1},
    "k1 as a loss": {},
    "no KL": {},
    "k3 in the reward, detached": {"KL(π‖ref)": -0.1, "KL(ref‖π)": 0.1},
    "k1 in the reward, sign swapped": {"KL(π‖ref)": 0.1},
}


@pytest.mark.parametrize("form", CLIMBED)
def test_what_a_form_is_the_gradient_of(form):
    """In all of them the reward term climbs E[r]; only the KL term differs."""
    loss, temperature = kl.FORMS[form]
    report = examine(lambda *inputs: loss(*inputs, 0.1))
    assert temperature is None and report.reward_term == {"E[r]": 1.0}
    assert report.kl_term == pytest.approx(CLIMBED[form], abs=1e-6) and report.kl_term.keys() == CLIMBED[form].keys()


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

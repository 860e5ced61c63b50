"""Options: flags, configuration files, ranges, resuming; every option is read by some line of code."""

import dataclasses
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from evaluate import EvaluateOptions
from rlhf_min.pretrain import PretrainOptions
from rlhf_min.support.errors import UserError
from rlhf_min.support.options import TrainingOptions, check_ranges, option, parse_options
from train_reinforce import ReinforceOptions
from train_rm import RewardModelOptions
from train_warp import WarpOptions

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [EvaluateOptions, PretrainOptions, ReinforceOptions, RewardModelOptions, WarpOptions]


@dataclass
class Options(TrainingOptions):
    """Options of a script that does not exist."""

    script: ClassVar[str] = "train_nothing.py"

    lr: float = option(1e-5, "learning rate, 100 % of it", low=0)
    eta: float = option(0.5, "weight", low=0, high=1)
    batch_size: int = option(64, "batch", low=1)
    names: list = option(["a"], "names")
    keep_all: bool = option(False, "whether to keep")
    kind: str = option("k1", "estimator", choices=["k1", "k2"])


def config(tmp_path, text):
    """The flags that read a configuration file of this text."""
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(tmp_path / "c.yaml")]


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    """A flag wins over the file wherever it stands, the file over the default, and each list is a new one."""
    file = config(tmp_path, "lr: 0.5\nbatch_size: 8\nkeep_all: true\n")
    for flags in ([*file, "--lr", "0.25", "--no-keep-all"], ["--lr", "0.25", "--no-keep-all", *file]):
        assert parse_options(Options, flags) == Options(lr=0.25, batch_size=8, keep_all=False)
    assert parse_options(Options, file).keep_all is True
    parse_options(Options, []).names.append("b")
    assert parse_options(Options, []) == Options() and Options().names == ["a"]


GOOD = [  # flags, the same in a file, option, value
    ("--batch-size 8", "batch-size: 8", "batch_size", 8),
    ("--batch_size=8", "batch_size: 8", "batch_size", 8),
    ("--names=my_judge=a.b_c", "names: my_judge=a.b_c", "names", ["my_judge=a.b_c"]),  # in a value, _ stays
    ("--names x y", "names: [x, y]", "names", ["x", "y"]),
    ("--keep-all", "keep_all: true", "keep_all", True),
    ("--keep_all --no-keep-all", "keep_all: false", "keep_all", False),
    ("--lr 1e-4", "lr: 1e-4", "lr", 1e-4),  # a string in YAML 1.1
    ("--eta 0", "eta: 0", "eta", 0.0),  # the ends of a range are in it
    ("--eta 1", "eta: '1.0'", "eta", 1.0),
]


@pytest.mark.parametrize("flags, text, name, value", GOOD, ids=[case[0] for case in GOOD])
def test_flags_and_files_say_the_same(tmp_path, flags, text, name, value):
    """Dashes and underscores both work, and a value has the type of its option, however it is written."""
    for argv in (flags.split(), config(tmp_path, text)):
        found = getattr(parse_options(Options, argv), name)
        assert found == value and type(found) is type(value)


BAD = [  # flags, the same in a file, what the message says
    ("--batchsize 8", "batchsize: 8", "--batchsize.8; did you mean --batch-size?"),
    ("--zzz 8", "zzz: 8", "--zzz.8; --help lists the flags"),
    ("--batch 8", "batch: 8", "--batch"),  # an abbreviation would break the day another flag begins like this one
    ("stray", "3: 8", "unrecognized arguments"),
    ("--lr", "lr:", "--lr"),
    ("--lr fast", "lr: fast", "fast"),
    ("--kind k3", "kind: k3", "k3"),
    ("--keep-all=maybe", "keep_all: maybe", "maybe"),
    ("--eta 1.5", "eta: '1.5'", "--eta must be between 0 and 1"),
    ("--eta nan", "eta: .nan", "--eta must be between 0 and 1"),
    ("--lr=-1", "lr: -.inf", "--lr must be at least 0"),
    ("--resume", "resume: true", "--resume needs --out"),
    ("--config gone.yaml", "config: other.yaml", "--config"),
    ("--config .", "kind: 2024-13-45", "--config .* cannot be read"),  # YAML makes a date of it, and fails
]


@pytest.mark.parametrize("flags, text, message", BAD, ids=[case[0] for case in BAD])
def test_mistakes_are_refused(tmp_path, monkeypatch, flags, text, message):
    """What is unknown, of the wrong type or out of its range is refused by its name, with the nearest flag's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")  # of no account without --out
    for argv in (flags.split(), config(tmp_path, text)):
        with pytest.raises(UserError, match=message):
            parse_options(Options, argv)


RANGES = {
    WarpOptions: "--eta=1.01 --eta=nan --mu=-0.01 --runs=0 --iterations=0 --beta=-1 --temperature=0 --max-length=1",
    ReinforceOptions: "--steps=0 --lr=-1e-5 --lr=nan --batch-size=0 --num-generations=0 --lora-r=-1 --lora-alpha=nan",
    RewardModelOptions: "--epochs=0 --eval-fraction=1 --lora-dropout=1",
}


@pytest.mark.parametrize("options_class, flag", [(key, flag) for key, row in RANGES.items() for flag in row.split()])
def test_ranges_of_the_algorithms(options_class, flag):
    """A number outside the range in which an algorithm is defined is refused."""
    with pytest.raises(UserError, match=f"{flag.split('=')[0]} must be"):
        parse_options(options_class, [flag])


@pytest.mark.parametrize("options_class", SCRIPTS)
def test_every_option_is_read_and_every_default_is_allowed(options_class, capsys):
    """Each option is read as `options.name` or checked as `self.name`, is within its range, and is in --help."""
    module = importlib.import_module(options_class.__module__)
    paths = {Path(module.__file__), *ROOT.glob("rlhf_min/**/*.py")} - {ROOT / "rlhf_min/pretrain.py"}
    source = "".join(path.read_text() for path in paths | {Path(module.__file__)})
    options = options_class()
    check_ranges(options)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(options):
        assert re.search(rf'\b(options|self)\.{field.name}\b(?!\s*=[^=])|\(options, "{field.name}"', source), field.name
        assert isinstance(getattr(options, field.name), field.type)
        assert getattr(options, field.name) in (field.metadata["choices"] or [getattr(options, field.name)])
        assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_file_is_read_by_its_script(path):
    """A file in configs/ names its script in its first lines, and that script knows all of its keys."""
    name = re.search(rf"python (?:-m )?(\S+?)(?:\.py)? .*--config configs/{re.escape(path.name)}", path.read_text())[1]
    (options_class,) = (script for script in SCRIPTS if script.__module__ == name)
    assert parse_options(options_class, ["--config", str(path)]) != options_class()


RESUMED = [  # flags, the options that the run goes on with (None: refused), what the message says
    ("", {}, ""),
    ("--save-every 1 --device cuda --precision auto --lr 0.5", {"save_every": 1, "device": "cuda"}, ""),
    ("--lr 0.25", None, "--lr is 0.5 in run/run.json, not 0.25"),
    ("--config c.yaml", None, "--eta is 0.25 in run/run.json, not 0.75"),
]


@pytest.mark.parametrize("flags, changes, message", RESUMED, ids=[case[0] or "none" for case in RESUMED])
def test_resume_goes_on_with_the_options_of_the_run(tmp_path, monkeypatch, flags, changes, message):
    """Without flags those of the run hold; one that would change the result is refused, with both values."""
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "eta: 0.75\n")
    begun = Options(out="run", device="cpu", precision="fp32", lr=0.5, eta=0.25)
    run = {"script": Options.script, "options": dataclasses.asdict(begun)}
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps(run))
    argv = ["--out", "run", "--resume", *flags.split()]
    if changes is None:
        with pytest.raises(UserError, match=message):
            parse_options(Options, argv)
    else:
        assert parse_options(Options, argv) == dataclasses.replace(begun, resume=True, **changes)
    with pytest.raises(UserError, match=r"a run of train_nothing\.py, not of train_warp\.py"):
        parse_options(WarpOptions, argv[:3])

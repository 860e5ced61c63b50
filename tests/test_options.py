"""Options: flags, configuration files, ranges, and that no option is a promise without a line that keeps it."""

import dataclasses
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_min.errors import UserError
from rlhf_min.options import option, parse_options

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {"check", "check_rows", "check_sigma", "draw_from", "files", "folder", "judge_specs", "load_prompts", "split"}


@dataclass
class Options:
    """Options of a script that does not exist."""

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


def scripts():
    """(module name, its dataclasses of options, its text) of every script and module that parses options."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("rlhf_min/*.py"), *ROOT.glob("benchmarks/*.py")]):
        text = path.read_text(encoding="utf-8")
        if path.name == "options.py" or "parse_options(" not in text:
            continue
        name = path.stem if path.parent == ROOT else f"{path.parent.name}.{path.stem}"
        module = importlib.import_module(name)
        classes = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == name]
        found.append((name, [c for c in classes if c.__name__.endswith("Options")], text))
    return found


SCRIPTS = scripts()
NAMES = [name for name, _, _ in SCRIPTS]


def test_defaults_hold_without_flags():
    """Without a flag every option has its default, and a list default is a new list each time."""
    first, second = parse_options(Options, []), parse_options(Options, [])
    assert first == Options() == second
    first.names.append("b")
    assert second.names == ["a"]


def test_flag_wins_over_file_and_file_over_default(tmp_path):
    """T59: the flag wins over the file, the file over the default."""
    file = config(tmp_path, "lr: 0.5\nbatch_size: 8\n")
    options = parse_options(Options, [*file, "--lr", "0.25"])
    assert (options.lr, options.batch_size, options.eta) == (0.25, 8, 0.5)
    assert parse_options(Options, ["--lr", "0.25", *file]).lr == 0.25


@pytest.mark.parametrize("flags", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch_size=8"]])
def test_dashes_and_underscores_both_work_in_flags(flags):
    """A flag may be written with dashes or with underscores."""
    assert parse_options(Options, flags).batch_size == 8


@pytest.mark.parametrize("key", ["batch-size", "batch_size"])
def test_dashes_and_underscores_both_work_in_files(tmp_path, key):
    """A key may be written with dashes or with underscores."""
    assert parse_options(Options, config(tmp_path, f"{key}: 8\n")).batch_size == 8


def test_underscores_in_values_stay(tmp_path):
    """Only the flag's name is normalised, not its value."""
    assert parse_options(Options, ["--names=my_judge=a.b_c"]).names == ["my_judge=a.b_c"]
    assert parse_options(Options, config(tmp_path, "names: my_judge=a.b_c\n")).names == ["my_judge=a.b_c"]


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("2.0e-3", 2e-3), ("'0.1'", 0.1), ("1", 1.0)])
def test_numbers_in_yaml_become_floats(tmp_path, text, value):
    """T59: `1e-4` is a string in YAML 1.1, and an integer may stand for a float; both become floats."""
    lr = parse_options(Options, config(tmp_path, f"lr: {text}\n")).lr
    assert lr == value
    assert type(lr) is float


def test_booleans(tmp_path):
    """A boolean is --flag or --no-flag, and true or false in a file."""
    assert parse_options(Options, ["--keep-all"]).keep_all is True
    assert parse_options(Options, ["--keep_all", "--no-keep-all"]).keep_all is False
    for text, value in (("true", True), ("false", False), ("yes", True)):
        assert parse_options(Options, config(tmp_path, f"keep_all: {text}\n")).keep_all is value
    assert parse_options(Options, [*config(tmp_path, "keep_all: true\n"), "--no-keep-all"]).keep_all is False


def test_lists(tmp_path):
    """A list is words behind a flag, and a list or a single word in a file."""
    assert parse_options(Options, ["--names", "x", "y"]).names == ["x", "y"]
    assert parse_options(Options, ["--names"]).names == []
    assert parse_options(Options, config(tmp_path, "names: [x, y]\n")).names == ["x", "y"]
    assert parse_options(Options, config(tmp_path, "names: x\n")).names == ["x"]


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--bogus", "1"], "--bogus"),
        (["--batch", "8"], "--batch"),  # an abbreviation would break the day another flag begins like this one
        (["--learning-rate", "1"], "--learning-rate"),
        (["stray"], "stray"),
        (["--lr"], "--lr"),
        (["--lr", "fast"], "fast"),
        (["--batch-size", "1.5"], "1.5"),
        (["--kind", "k3"], "k3"),
        (["--keep-all=maybe"], "maybe"),
    ],
)
def test_bad_flags_are_refused(flags, fragment):
    """T59: a flag that is unknown, abbreviated or of the wrong type is refused by its name."""
    with pytest.raises(UserError, match=re.escape(fragment)):
        parse_options(Options, flags)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("batchsize: 8\n", "unknown key 'batchsize'; did you mean batch_size?"),
        ("zzz: 8\n", "unknown key 'zzz'; --help"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("3: 8\n", "unknown key 3"),
        ("lr: fast\n", "fast"),
        ("lr: true\n", "--lr"),
        ("lr: [1, 2]\n", "2"),
        ("lr:\n", "--lr"),
        ("keep_all: maybe\n", "maybe"),
        ("kind: k3\n", "k3"),
        ("- lr\n", "must hold lines of the form"),
        ("", "must hold lines of the form"),
        ("lr: [1\n", "is not YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, fragment):
    """T59: an unknown key, a wrong type or a file that is no mapping is refused, and the message names the file."""
    with pytest.raises(UserError, match=re.escape(fragment)) as error:
        parse_options(Options, config(tmp_path, text))
    assert "c.yaml" in str(error.value)


def test_a_date_that_is_none_is_refused(tmp_path):
    """T59: YAML turns 2024-13-45 into a date and fails; that, too, is a mistake of the user's."""
    with pytest.raises(UserError, match=re.escape("c.yaml")):
        parse_options(Options, config(tmp_path, "kind: 2024-13-45\n"))


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "inf", "-inf"])
@pytest.mark.parametrize("from_file", [False, True])
def test_range_is_checked_in_flag_and_file(tmp_path, value, from_file):
    """T59: a value outside [0, 1], or none at all, is refused wherever it comes from."""
    flags = config(tmp_path, f"eta: '{value}'\n") if from_file else [f"--eta={value}"]
    with pytest.raises(UserError, match="--eta must be between 0 and 1"):
        parse_options(Options, flags)


@pytest.mark.parametrize("value", ["0", "1", "0.5"])
def test_range_is_closed(value):
    """T47: the ends of [0, 1] are values, too: η = 0 is the init, η = 1 the merged policy."""
    assert parse_options(Options, ["--eta", value]).eta == float(value)


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--eta", "1.01"], "--eta"),
        (["--eta", "nan"], "--eta"),
        (["--mu", "-0.01"], "--mu"),
        (["--mu", "2"], "--mu"),
        (["--runs", "0"], "--runs"),
        (["--iterations", "0"], "--iterations"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr=-1e-5"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--beta", "-1"], "--beta"),
        (["--temperature", "0"], "--temperature"),
        (["--max-length", "1"], "--max-length"),
    ],
)
def test_ranges_of_warp(flags, fragment):
    """T59: the ranges of WARP's numbers are those of its algorithm."""
    from train_warp import WarpOptions

    with pytest.raises(UserError, match=f"{fragment} must be"):
        parse_options(WarpOptions, flags)


@pytest.mark.parametrize(
    "flags, fragment",
    [
        (["--beta=-0.1"], "--beta"),
        (["--steps", "0"], "--steps"),
        (["--num-generations", "0"], "--num-generations"),
        (["--num-eval-prompts", "2"], "--num-eval-prompts"),
        (["--sigma-coefficient=-1"], "--sigma-coefficient"),
        (["--missing-eos-penalty", "-2"], "--missing-eos-penalty"),
        (["--lora-r=-1"], "--lora-r"),
        (["--lora-alpha", "nan"], "--lora-alpha"),
        (["--max-prompt-characters=-5"], "--max-prompt-characters"),
    ],
)
def test_ranges_of_reinforce(flags, fragment):
    """T59: the ranges of REINFORCE's numbers: penalties are taken from the reward, never added to it."""
    from train_reinforce import ReinforceOptions

    with pytest.raises(UserError, match=f"{fragment} must be"):
        parse_options(ReinforceOptions, flags)


def test_every_script_is_found():
    """The tests below run over every script that there is."""
    scripts = {"train_rm", "train_reinforce", "train_warp", "evaluate", "rlhf_min.pretrain"}
    benchmarks = {f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts | benchmarks <= set(NAMES)
    assert all(len(classes) == 1 for _, classes, _ in SCRIPTS)


def project_source(module):
    """The text of a script and of all functions and classes of the project that it uses, and that these use, ..."""
    ours = lambda value: re.match(r"rlhf_min\.|benchmarks\.|train_|evaluate", getattr(value, "__module__", None) or "")
    text, seen = inspect.getsource(module), set()
    queue = [(text, module)]
    while queue:
        source, home = queue.pop()
        for first, name in re.findall(r"\b(?:(\w+)\.)?(\w+)\b", source):
            owner = getattr(home, first, None) if first else home
            value = getattr(owner, name, None) if inspect.ismodule(owner) else None
            if callable(value) and ours(value) and value not in seen and name != "main" and "Options" not in name:
                seen.add(value)
                more = inspect.getsource(value)
                text += more
                queue.append((more, inspect.getmodule(value)))
    return text


@pytest.mark.parametrize("name, classes, text", SCRIPTS, ids=NAMES)
def test_every_option_is_read(name, classes, text):
    """T59: every option of a script is checked, or read as `options.name`, in it or in a function that it calls."""
    module = importlib.import_module(name)
    source = project_source(module)
    if "train_reinforce.main(" in inspect.getsource(module):  # which is given all of them
        source += project_source(importlib.import_module("train_reinforce"))
    for base in classes[0].__mro__[:-1]:
        for method in (
            value for value in vars(base).values() if inspect.isfunction(value) and value.__name__ in CHECKS
        ):
            source += inspect.getsource(method).replace("self.", "options.")
    names = [field.name for field in dataclasses.fields(classes[0])]
    unread = [n for n in names if not re.search(rf"\boptions\.{n}\b(?!\s*=[^=])", source)]
    assert unread == []


@pytest.mark.parametrize("name, classes, text", SCRIPTS, ids=NAMES)
def test_defaults_pass_their_own_checks_and_help_lists_every_flag(name, classes, text, capsys):
    """The defaults are within their ranges, and --help names every flag and exits with 0."""
    defaults = parse_options(classes[0], [])
    for field in dataclasses.fields(defaults):
        choices = field.metadata["choices"]
        assert isinstance(getattr(defaults, field.name), field.type), field.name
        assert choices is None or getattr(defaults, field.name) in choices
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in out for field in dataclasses.fields(defaults))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_file_is_read_by_its_script(path):
    """T59: a file in configs/ names its script in its first lines, and that script knows all of its keys."""
    found = re.search(r"python (?:-m )?(\S+?)(?:\.py)? .*--config configs/" + re.escape(path.name), path.read_text())
    assert found, "no line 'python <script> --config configs/<file>'"
    (options_class,) = SCRIPTS[NAMES.index(found.group(1).replace("/", "."))][1]
    assert parse_options(options_class, ["--config", str(path)]) != options_class()

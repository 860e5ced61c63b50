"""Options: one dataclass a script. A flag wins over the --config file, the file over the default."""

import argparse
import dataclasses
import difflib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from .errors import UserError, first_line
from .files import read_json

# these may change on resume: the computation stays the same, though another device rounds differently
FREE = ("out", "device", "resume", "save_every", "report_to", "accept_weak")


def option(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and, where it has one, its closed range [low, high]."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class RunOptions:
    """What every script has."""

    script: ClassVar[str] = ""  # what stands behind `python` on the command line

    out: str = option("", "folder of the run (default: the next runs/<script>-N)")
    seed: int = option(42, "seed of all random numbers", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "mixed precision", choices=["auto", "fp32", "bf16", "fp16"])

    def check(self):
        """UserError for options that do not go together."""


@dataclass
class TrainingOptions(RunOptions):
    """What every script has that trains."""

    resume: bool = option(False, "go on with the interrupted run in --out; begin it where there is none")
    report_to: str = option("", "also log there; needs that package", choices=["", "tensorboard", "wandb"])
    save_every: int = option(50, "steps between two checkpoints, which --resume continues from; 0 saves none", low=0)

    def check(self):
        if self.resume and not self.out:
            raise UserError("--resume needs --out, the folder of the interrupted run")
        if self.report_to and not importlib.util.find_spec(self.report_to):
            raise UserError(f"--report-to {self.report_to} needs: pip install {self.report_to}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        raise UserError(f"{message}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags"))


def flag_of(name):
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def build_parser(options_class):
    """A parser whose result holds the flags that are given, and no others."""
    parser = _Parser(description=options_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file of options: a diff against the defaults")
    for field in dataclasses.fields(options_class):
        flag, help = flag_of(field.name), field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        elif field.type is list:
            parser.add_argument(flag, nargs="+", help=help)
        else:
            shown = f"{help} (default: {field.default})" if field.default != "" else help
            parser.add_argument(flag, type=field.type, choices=field.metadata["choices"], help=shown)
    return parser


def flags_of_config(path):
    """The lines `option: value` of a YAML file as flags, so that one parser checks both."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the file system's errors, and what PyYAML lets through beside its own
        raise UserError(f"--config {path} cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    flags = []
    for name, value in config.items():
        flag = flag_of(str(name))
        if flag in ("--config", "--help"):
            raise UserError(f"--config {path}: {name} is no option of a run")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(flag if value is None else f"{flag}={value}")
    return flags


def options_of_run(options_class, given):
    """The options of the interrupted run in --out; UserError where one that is given would change its result."""
    run = read_json(Path(given["out"], "run.json"))
    if run.get("script") != options_class.script:
        raise UserError(f"--resume: {given['out']} holds a run of {run.get('script')}, not of {options_class.script}")
    stored = run.get("options", {})
    if stored.keys() != {field.name for field in dataclasses.fields(options_class)}:
        raise UserError(f"{given['out']}/run.json is of another version of {options_class.script}; begin a new run")
    for name, value in given.items():
        if name not in FREE and value != stored[name] and value != "auto":
            differs = f"{flag_of(name)} is {stored[name]!r} in {given['out']}/run.json, not {value!r}"
            raise UserError(f"--resume goes on with the run's options: {differs}; leave it out, or begin a new run")
    return stored | {name: value for name, value in given.items() if name in FREE}


def check_ranges(options):
    """UserError for a number out of its range."""
    for field in dataclasses.fields(options):
        flag, value = flag_of(field.name), getattr(options, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{flag} must be {bounds}, not {value}")


def parse_options(options_class, argv=None):
    """Defaults, then the --config file, then the flags; with --resume, the interrupted run's options.

    Dashes and underscores both work in a flag. UserError for an unknown flag or key, a value of the wrong type or out
    of its range, and options that do not go together.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), str(word)) for word in argv]
    parser = build_parser(options_class)
    given = vars(parser.parse_args(argv))
    config = given.pop("config", None)
    if config is not None:
        try:
            given = vars(parser.parse_args(flags_of_config(config))) | given
        except UserError as error:
            raise UserError(str(error) if config in str(error) else f"--config {config}: {error}") from None
    if given.get("resume") and given.get("out") and Path(given["out"], "run.json").exists():
        given = options_of_run(options_class, given)
    options = options_class(**given)
    check_ranges(options)
    options.check()
    return options

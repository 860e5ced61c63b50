"""Options: one dataclass a script. A flag wins over the --config file, the file over the default."""

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path

import yaml

from .errors import UserError


def option(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and, where it has one, its closed range [low, high]."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class RunOptions:
    """What every script has."""

    out: str = option("", "folder of the run (default: the next runs/<script>-N)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "mixed precision", choices=["auto", "fp32", "bf16", "fp16"])


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage, too; one line is enough
        raise UserError(f"{message}; --help lists the flags")


def _build_parser(options_class):
    parser = _Parser(description=options_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options, a diff against the defaults")
    for field in dataclasses.fields(options_class):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        default = dataclasses.MISSING  # keeps "not given" apart from any value
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
        elif field.type is list:
            parser.add_argument(flag, nargs="*", default=default, help=help)
        else:
            shown = f"{help} (default: {field.default})" if field.default != "" else help
            parser.add_argument(flag, type=field.type, choices=field.metadata["choices"], default=default, help=shown)
    return parser


def _config_as_flags(path, names):
    """The configuration file as a list of flags, so that one parser checks both."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 is no date
        raise UserError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    flags = []
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise UserError(f"--config {path}: unknown key {key!r}; {hint}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(f"{flag}={'' if value is None else value}")
    return flags


def parse_options(options_class, argv=None):
    """Defaults, then the --config file, then the flags.

    Dashes and underscores both work in a flag. Raises UserError for an unknown flag or key, a value of the wrong type
    or one out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            argv[i] = name.replace("_", "-") + equals + value
    parser = _build_parser(options_class)
    given = vars(parser.parse_args(argv))
    config, values = given.pop("config"), {}
    if config is not None:
        flags = _config_as_flags(config, [field.name for field in dataclasses.fields(options_class)])
        try:
            values = vars(parser.parse_args(flags))
        except UserError as error:
            raise UserError(f"--config {config}: {error}") from None
    values = {name: value for name, value in values.items() if value is not dataclasses.MISSING and name != "config"}
    values |= {name: value for name, value in given.items() if value is not dataclasses.MISSING}
    options = options_class(**values)
    for field in dataclasses.fields(options):
        value, low, high = getattr(options, field.name), field.metadata["low"], field.metadata["high"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"--{field.name.replace('_', '-')} must be {bounds}, not {value}")
    return options

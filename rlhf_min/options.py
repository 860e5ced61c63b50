"""Options: one dataclass a script. A flag wins over the --config file, the file over the default.

No torch here, so that a mistake is refused in a fraction of a second.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar

import yaml

from . import toy
from .data import hold_out_of, load_prompts, prompt_of_row, read_prompts, with_answer
from .errors import UserError, one_line_errors, world_size
from .files import read_json
from .model_files import check_ends
from .preflight import (
    FIRST,
    check_device,
    check_judge,
    check_policy,
    check_targets,
    check_template,
    first_rows,
    quick_tokenizer,
)
from .resume import check_resume
from .sources import check_source, named_judges

LARGEST = {int: 2**31 - 1, float: 1e30}  # what any number may be: torch's kernels overflow beyond


def option(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and, where it has one, its closed range [low, high]."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class RunOptions:
    """What every script has."""

    script: ClassVar[str] = ""  # what comes behind `python` on the command line
    parallel: ClassVar[bool] = False  # whether torchrun may start several processes of it
    resume, save_every = False, 0  # options only of what trains; without a type they are no fields here

    out: str = option("", "folder of the run (default: the next runs/<script>-N)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "mixed precision", choices=["auto", "fp32", "bf16", "fp16"])

    def folder(self):
        """The folder of the run: `out` if nothing is there, else UserError; without `out` the first free one."""
        if not self.out:
            name = re.split("[./]", self.script.removesuffix(".py"))[-1].removeprefix("train_")
            folder = next(folder for n in count(1) if not os.path.lexists(folder := Path("runs", f"{name}-{n}")))
        else:
            folder = Path(self.out)
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(f"--out {folder} cannot be made: {there} {why}; name another folder")
        if str(folder).encode(errors="ignore").decode() != str(folder):  # safetensors could not write into it
            raise UserError(f"--out {folder}: a name that is no UTF-8; name another folder")
        if any(not path.name.endswith(".new") for path in folder.glob("*")):  # .new: half written, see checkpoint.py
            raise UserError(f"--out {self.out} holds another run or other files; name a new folder, or add --resume")
        return folder

    def files(self):
        """The files and hub data sets that the options name, "" where they name none."""
        return []

    def model_names(self):
        """All models, and functions, that the options name."""
        return []

    def check(self):
        """UserError for flags that do not go together and for names of what is not there or not what it should be."""
        if world_size() > 1 and not self.parallel:
            raise UserError(f"{self.script} runs in one process; start it without torchrun")
        self.folder()
        check_device(self.device)
        for file in self.files():
            if file not in toy.FILES:
                check_source(file)

    def check_rows(self):
        """UserError for broken rows and too few of them, in files that are there."""

    def check_tokens(self):
        """UserError for what the tokenizers of local models show, in the first rows."""

    def all_local(self):
        """Whether no data have to be downloaded or made."""
        return all(Path(file).is_file() for file in self.files() if file)


@dataclass
class TrainingOptions(RunOptions):
    """What every script has that trains."""

    resume: bool = option(False, "go on with the interrupted run in --out, whose options hold; without one, begin it")
    save_every: int = option(50, "steps between two checkpoints, which --resume continues from; 0 saves none", low=0)

    def folder(self):
        """As RunOptions.folder; with --resume, --out may hold an interrupted run of this script."""
        if self.resume and not self.out:
            raise UserError("--resume needs --out, the folder of the interrupted run")
        return Path(self.out) if self.resume and Path(self.out, "run.json").exists() else super().folder()

    def check(self):
        """As RunOptions.check; with --resume, a run that has finished is left alone, with exit code 0."""
        super().check()
        if self.resume and Path(self.out, "summary.json").exists():
            if not Path(self.out, "model").exists():
                raise UserError(f"the run in {self.out} has finished without a model; begin a new one")
            shutil.rmtree(Path(self.out, "checkpoint"), ignore_errors=True)  # in case it was killed at the very end
            print(f"the run in {self.out} has finished: nothing to resume")
            raise SystemExit(0)


@dataclass
class LoRAOptions(TrainingOptions):
    """LoRA, for what trains a reward model or a policy."""

    lora_dropout = 0.0  # an option of reward models only, hence no field here
    lora_r: int = option(0, "rank r of LoRA's adapters; 0 trains all weights", low=0)
    lora_alpha: float = option(32.0, "α: the update is scaled by α/r", low=1e-6)
    lora_target_modules: list = option([], "last parts of the names of the modules that get an adapter "
                                           "(default: those of attention's queries and values)")  # fmt: skip

    def check_lora(self, name):
        """UserError for flags of LoRA without a rank, and for targets that the model `name` does not have."""
        if self.lora_r:
            check_targets(name, self.lora_target_modules)
            return
        for other in ("lora_alpha", "lora_target_modules", "lora_dropout"):
            if getattr(self, other) != getattr(type(self)(), other):
                raise UserError(f"{_flag(other)} goes with LoRA only; set --lora-r or leave it out")


@dataclass
class SamplingOptions(RunOptions):
    """Prompts, judges, and how answers are drawn.

    A subclass has, besides `files`: policy_names(); judge_specs(), as `name=spec` or `spec`; and draw_from(prompts,
    others), the prompts to draw the evaluation's from, given those of the two files, UserError where they are too few.
    """

    prompts: str = option(toy.PROMPTS, "lines with 'prompt', or with 'text', whose first tokens are the prompt")
    prompt_tokens: int = option(10, "tokens of a 'text' that make a prompt", low=1)
    max_prompt_characters: int = option(0, "leave out longer prompts; 0 keeps all", low=0)
    judges: list = option([], "name=spec, spec a reward model or package.module.function, to judge the answers "
                              "(the embedded world brings its own)")  # fmt: skip
    temperature: float = option(0.7, "of sampling and scoring: it belongs to the policy", low=0.01)
    max_length: int = option(64, "tokens of prompt and answer", low=2)
    batch_size: int = option(64, "answers at a time", low=1)
    seed: int = option(42, "seed of prompts and samples", low=0, high=2**31 - 1)

    def bare_judges(self):
        """The judges without their names."""
        return named_judges(self.judge_specs()).values()

    def model_names(self):
        return [*self.policy_names(), *self.bare_judges()]

    def load_prompts(self, tokenizer):
        """[the prompts of each file], without a tokenizer whole, and of local files only; none without a file."""
        limits = self.prompt_tokens, self.max_length, self.max_prompt_characters
        return [load_prompts(file, tokenizer, *limits) if file and (tokenizer or Path(file).is_file()) else []
                for file in self.files()]  # fmt: skip

    def check(self):
        super().check()
        if self.prompt_tokens >= self.max_length:
            raise UserError(f"--prompt-tokens {self.prompt_tokens} leaves no room for an answer; --max-length is "
                            f"{self.max_length}")  # fmt: skip
        for name in self.policy_names():
            check_policy(name, self.max_length)
        for name in self.bare_judges():
            check_judge(name)

    def check_rows(self):
        prompts = self.load_prompts(None)
        if self.all_local():
            self.draw_from(*prompts)

    def check_tokens(self):
        rows = first_rows(self.files(), read_prompts, self.max_prompt_characters)
        messages = [text for _, text, _ in rows if isinstance(text, list)]
        for name in self.policy_names():
            tokenizer, exact = quick_tokenizer(name)
            if not exact:
                check_template(tokenizer, messages, add_generation_prompt=True)
                continue
            check_ends(name, tokenizer, policy=True)
            if self.all_local() and len(rows) < FIRST:  # these are all
                self.draw_from(*self.load_prompts(tokenizer))
            else:
                for row in rows:
                    prompt_of_row(*row, tokenizer, self.prompt_tokens, self.max_length)
        if messages:
            for name in self.bare_judges():
                check_template(quick_tokenizer(name)[0], [with_answer(prompt, "Yes.") for prompt in messages])


@dataclass
class PolicyOptions(SamplingOptions, LoRAOptions):
    """What trains a policy."""

    policy: str = option(toy.POLICY, "π_sft: a run folder, a transformers folder, an adapter or a hub name")
    reward_model: str = option(toy.REWARD_MODEL, "a reward model of either head, or package.module.function")
    eval_prompts: str = option("", "prompts of the evaluation (default: some of --prompts are held out)")
    num_eval_prompts: int = option(256, "how many prompts to evaluate on", low=3)
    steps: int = option(100, "T: optimizer steps, of each policy", low=1)
    lr: float = option(1e-4, "AdamW learning rate", low=0)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", low=1e-6)

    def files(self):
        return [self.prompts, self.eval_prompts]

    def policy_names(self):
        return [self.policy]

    def judge_specs(self):
        return [f"reward={self.reward_model}", *self.judges]

    def draw_from(self, prompts, others):
        return hold_out_of(prompts, others, self.num_eval_prompts)

    def check(self):
        super().check()
        self.check_lora(self.policy)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage, too; one line is enough
        raise UserError(f"{message}; --help lists the flags")


def _flag(name):
    return "--" + name.replace("_", "-")


def _build_parser(options_class):
    """A parser whose result holds the flags that are given, and no others."""
    parser = _Parser(description=options_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file of options, a diff against the defaults")
    for field in dataclasses.fields(options_class):
        flag, help = _flag(field.name), field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        elif field.type is list:
            parser.add_argument(flag, nargs="*", help=help)
        else:
            shown = f"{help} (default: {field.default})" if field.default != "" else help
            parser.add_argument(flag, type=field.type, choices=field.metadata["choices"], help=shown)
    return parser


def _parse_mapping(parser, mapping, options_class, where):
    """{option: value} parsed as if they were flags, so that one parser checks both."""
    names, flags = [field.name for field in dataclasses.fields(options_class)], []
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        flag = _flag(name)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in values):
            raise UserError(f"{where}: {key} must be one value, or a list of such")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, values)]
        else:
            flags.append(f"{flag}={'' if value is None else value}")
    try:
        return vars(parser.parse_args(flags))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


class _ConfigLoader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        if len({*keys}) < len(keys):
            raise ValueError(f"a key twice: {max(keys, key=keys.count)}")
        return super().construct_mapping(node, deep)


def _read_config(path):
    try:
        if not Path(path).is_file():  # what can be read only once, such as <(echo lr: 1)
            raise OSError("no such file (a pipe is none: write it to a file)")
        config = yaml.load(Path(path).read_text(encoding="utf-8"), _ConfigLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    except Exception as error:  # of PyYAML's own, and what it lets through: 2024-13-45 is no date
        raise UserError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    return config


def _interrupted(parser, options_class, values):
    """The options of the run that --resume goes on with; UserError where one of `values` would change its result."""
    path = Path(values.get("out", ""), "run.json")
    if not values.get("out") or not path.exists():
        return values
    run = read_json(path)
    if run.get("script") != options_class.script or not isinstance(run.get("options"), dict):
        raise UserError(f"--resume: {path} is not that of a run of {options_class.script}; name its --out")
    stored = _parse_mapping(parser, run["options"], options_class, path)
    free = ("out", "device", "resume", "save_every")  # they change nothing, or on another device the last digits
    differ = [f"{_flag(name)} is {stored.get(name)!r} there, not {value!r}"
              for name, value in values.items()
              if name not in free and value != stored.get(name)
              and value not in ("auto", "", [])]  # fmt: skip  # which a run fills in itself
    if differ:
        raise UserError(f"--resume goes on with the options of the run in {values['out']}: {'; '.join(differ)}. "
                        "Leave them out, or begin a new run")  # fmt: skip
    return stored | {name: value for name, value in values.items() if name in free}


def parse_options(options_class, argv=None):
    """Defaults, then the --config file, then the flags; with --resume, the options of the run instead of defaults.

    Dashes and underscores both work in a flag. Raises UserError for an unknown flag or key, a value of the wrong type
    or one out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            argv[i] = name.replace("_", "-") + equals + value
    parser = _build_parser(options_class)
    values = vars(parser.parse_args(argv))
    config = values.pop("config", None)
    if config is not None:
        values = _parse_mapping(parser, _read_config(config), options_class, f"--config {config}") | values
    if values.get("resume"):
        values = _interrupted(parser, options_class, values)
    options = options_class(**values)
    for field in dataclasses.fields(options):
        flag, value = _flag(field.name), getattr(options, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{flag} must be {bounds}, not {value}")
        if field.type in LARGEST and not abs(value) <= LARGEST[field.type]:
            raise UserError(f"{flag} must be at most {LARGEST[field.type]}, not {value}")
        if field.type is str and field.default and not value:
            raise UserError(f"{flag} is empty; leave it out or give a value")
    return options


@one_line_errors
def refuse_mistakes(options_class):
    """Check the command line and what it names before torch takes its seconds to import, the quickest checks first."""
    options = parse_options(options_class)
    options.check()
    check_resume(options)
    options.check_rows()
    if options.device not in ("auto", "cpu"):
        from .precision import pick_device  # imports torch, but not transformers' models

        pick_device(options.device)
    options.check_tokens()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while torch is imported has nothing to tell

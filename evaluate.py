"""Compare policies under judges, on the same prompts and random numbers; put the fronts of WARP runs into one plot.

    python evaluate.py --policies runs/toy/policy runs/warp-1      # the first is the reference
    python evaluate.py --policies runs/toy/policy runs/reinforce-1 runs/warp-1 --match-kl 1
    python evaluate.py --front runs/warp-1 runs/warp-2             # the fronts that they printed, in one plot

Without a flag: the embedded world's SFT policy against the newest WARP run. A judge's `_z` is in standard deviations of
the first policy's rewards, `_delta` the mean difference to the first policy on the same prompts, `_low` and `_high` the
ends of its 95 % bootstrap interval, `_win_rate` the share of prompts that are won, a tie counting ½. `reward` is the
embedded world's reward model, not the one that a run was trained on. Above the table stand the answers to ten of the
prompts: read them before you believe a number.

No policy is judged on prompts that it, or the policy it began with, was trained on: run.json says which those are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch

from rlhf_min import evaluation, toy
from rlhf_min.data import distinct, hold_out, load_prompts
from rlhf_min.reward_model import load_judges, named_judges
from rlhf_min.rollout import load_policy
from rlhf_min.support.errors import UserError, one_line_errors
from rlhf_min.support.files import read_json
from rlhf_min.support.options import flag_of, option, parse_options
from rlhf_min.support.plots import plot_front
from rlhf_min.support.precision import resolve_device
from rlhf_min.support.runlog import RunLog
from train_rm import prepare_world


@dataclass
class EvaluateOptions(evaluation.SamplingOptions):
    """Compare policies with the first one under judges, or the fronts of WARP runs."""

    script: ClassVar[str] = "evaluate.py"

    policies: list = option([], "policies to compare, the first is the reference (of a WARP run, model/ or merged/)")
    match_kl: float = option(0.0, "compare at this KL to the first policy, in nats per answer; 0 as they are", low=0)
    front: list = option([], "finished WARP runs whose fronts go into one table and plot, instead of --policies")
    judges: list = option([], "name=spec (default: those of the embedded world)")
    num_prompts: int = option(256, "how many prompts to evaluate on", low=2)

    def check(self):
        if self.front and (self.policies or self.match_kl):
            raise UserError("--front goes without --policies and --match-kl; run evaluate.py twice")
        if not (self.front or self.judges) and self.prompts != toy.PROMPTS:
            raise UserError("--prompts: these are not the embedded world's; name --judges")
        self.judges = self.judges or [f"reward={toy.REWARD_MODEL}", *toy.JUDGES]
        if not self.front and not self.policies:
            finished = sorted(Path("runs").glob("warp-*/summary.json"), key=lambda path: path.stat().st_mtime)
            if not finished:
                raise UserError("no WARP run in runs/ to compare; run train_warp.py first, or name --policies")
            self.policies = [toy.POLICY, str(finished[-1].parent)]


def run_options(name):
    """The options of the training run that a policy's folder belongs to, else None."""
    found = [path for path in (Path(name, "run.json"), Path(name).parent / "run.json") if path.is_file()]
    options = SimpleNamespace(**{"columns": [], **read_json(found[0]).get("options", {})}) if found else None
    return options if hasattr(options, "num_eval_prompts") else None


def trained_on(name, tokenizer, length):
    """The prompts that a policy, and the policy it began with, and so on, were trained on.

    UserError where those cut from a `text` have not `length` tokens: the new prompts would look like other ones.
    """
    options = run_options(name)
    if options and options.prompt_tokens != length:
        raise UserError(f"{name} was trained with --prompt-tokens {options.prompt_tokens}; give the same")
    if not options:
        return []
    return evaluation.prompts_of(options, tokenizer)[0] + trained_on(options.policy, tokenizer, length)


def draw_prompts(names, tokenizer, options):
    """`num_prompts` prompts that none of the named policies was trained on."""
    prompts = load_prompts(options.prompts, tokenizer, options)
    for name in names:
        prompts = distinct(prompts, trained_on(name, tokenizer, options.prompt_tokens))
    return hold_out(prompts, options.num_prompts, "that no policy was trained on; lower --num-prompts")


def compare(judges, options, device):
    """A row per policy; against the first one z-scores, paired differences and win rates under every judge.

    Also returned are the answers, {policy: columns of judge_policy}.
    """
    rows, first, reference, answers = [], None, None, {}
    for name in options.policies:
        policy, tokenizer = load_policy(name, device, options.max_length)
        if reference is None:
            reference, vocabulary = policy, tokenizer.get_vocab()
        size = policy.config.vocab_size == reference.config.vocab_size
        same = size and tokenizer.get_vocab() == vocabulary  # KL needs the same tokens
        if options.match_kl and not same:
            raise UserError(f"{name}: --match-kl needs the vocabulary of {options.policies[0]}")
        prompts, row = draw_prompts(options.policies, tokenizer, options), {"policy": name}
        if options.match_kl:
            row["eta"] = evaluation.match_kl(policy, tokenizer, prompts, options, reference, options.match_kl)
        trained = run_options(name)
        for flag in ("temperature", "max_length") if trained else ():
            if getattr(trained, flag) != getattr(options, flag):
                was = f"was trained with {flag_of(flag)} {getattr(trained, flag)}"
                print(f"{name} {was}, and is judged with {getattr(options, flag)}", file=sys.stderr)
        columns = evaluation.judge_policy(policy, tokenizer, prompts, judges, options, reference if same else None)
        first = first or columns
        if columns["prompt"] != first["prompt"]:
            raise UserError(f"{name}: its tokenizer cuts other prompts of a 'text' than the first's; use 'prompt'")
        row |= evaluation.summarise(columns, judges)
        for judge in judges:
            values, reference_values = columns[judge], first[judge]
            row[f"{judge}_z"] = evaluation.z_score(values, reference_values)
            if columns is not first:
                generator = torch.Generator().manual_seed(options.seed)
                difference = evaluation.paired_difference(values, reference_values, generator)
                row |= dict(zip((f"{judge}_delta", f"{judge}_delta_low", f"{judge}_delta_high"), difference))
                row[f"{judge}_win_rate"] = evaluation.win_rate(values, reference_values)
        rows.append(row)
        answers[name] = columns
    return rows, answers


def front_of(run):
    """The front that a finished WARP run has printed."""
    if not Path(run, "summary.json").is_file() or "front" not in (summary := read_json(f"{run}/summary.json")):
        raise UserError(f"--front {run}: no summary.json of a WARP run in it; did the run finish?")
    return summary["front"]


@one_line_errors
def main(argv=None):
    options = parse_options(EvaluateOptions, argv)
    device = resolve_device(options)
    log = RunLog(options)
    if options.front:
        fronts = {run: front_of(run) for run in options.front}
        rows = [{"run": run, **row} for run, front in fronts.items() for row in front]
        names = [name for name in rows[0] if name != "kl" and all(row.get(f"{name}_se") is not None for row in rows)]
        samples = []
    else:
        specs = named_judges(options.judges)
        prepare_world([options.prompts, *options.policies, *specs.values()])
        rows, answers = compare(load_judges(options.judges, device), options, device)
        names, samples = [*specs], evaluation.print_samples(answers, 10)
        print(f"\n{options.num_prompts} prompts of {options.prompts}, none of which a policy was trained on")
        fronts = {row["policy"]: [row] for row in rows if row["kl"] == row["kl"]}  # KL is NaN across tokenizers
    table = evaluation.format_table(rows)
    print(f"\n{table}\n")
    with log.running():
        (log.folder / "table.md").write_text(table + "\n", encoding="utf-8")
        plot_front(fronts, names, log.folder / "front.png")
        log.finish(rows=rows, samples=samples)


if __name__ == "__main__":
    main()

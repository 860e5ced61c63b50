"""Compare policies under judges, on the same prompts and random numbers; sweep the front of WARP runs.

    python evaluate.py --policies runs/toy/policy runs/warp-1      # the first is the reference
    python evaluate.py --policies runs/toy/policy runs/reinforce-1 runs/warp-1 --match-kl 1
    python evaluate.py --front runs/warp-1 runs/warp-2             # their KL–reward fronts in one plot

Without a flag: the embedded world's SFT policy against the newest WARP run. A judge's `_z` is in standard deviations of
the first policy's rewards, `_delta` the mean difference to the first policy on the same prompts, `_low` and `_high` the
ends of its 95 % bootstrap interval, `_win_rate` the share of prompts that are won, a tie counting ½.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlhf_min import toy
from rlhf_min.data import without
from rlhf_min.errors import UserError, one_line_errors
from rlhf_min.files import read_json
from rlhf_min.options import SamplingOptions, option, parse_options, refuse_mistakes
from rlhf_min.preflight import quick_tokenizer, read_config

SIZES = {"n_embd", "hidden_size", "n_layer", "num_hidden_layers"}  # in config.json


@dataclass
class EvaluateOptions(SamplingOptions):
    """Compare policies with the first one under judges, or sweep the fronts of WARP runs."""

    script: ClassVar[str] = "evaluate.py"

    policies: list = option(
        [],
        "policies to compare, the first is the reference: run folders (of a WARP run the last θ_init; name its merged/ "
        "for θ_slerp), transformers folders, adapters or hub names (default: the SFT policy and the newest WARP run)",
    )
    match_kl: float = option(
        0.0, "compare at this KL to the first policy, in nats: those further off are moved back; 0 as they are", low=0
    )
    front: list = option([], "WARP runs whose front θ_sft → θ_slerp is swept over η, instead of --policies")
    front_points: int = option(5, "values of η, evenly spaced in [0, 1]", low=2)
    exclude: str = option("", "leave out prompts that this file has, too, such as the training prompts")
    num_prompts: int = option(
        256, "prompts, drawn by --seed: with seed and number of a training run, those it held out", low=2
    )

    def files(self):
        return [self.prompts, self.exclude]

    def policy_names(self):
        return [*self.policies, *map(sft_of, self.front), *(f"{run}/merged" for run in self.front)]

    def judge_specs(self):
        return self.judges or [f"reward={toy.REWARD_MODEL}", *toy.JUDGES]

    def draw_from(self, prompts, others):
        prompts = without(prompts, others)
        if len(prompts) < self.num_prompts:
            raise UserError(f"{self.prompts}: {len(prompts)} distinct prompts; lower --num-prompts {self.num_prompts}")
        return prompts

    def check(self):
        if self.front and self.policies:
            raise UserError("--front and --policies exclude each other; run evaluate.py twice")
        if self.front and self.match_kl:
            raise UserError("--match-kl goes with --policies; a front has all of its KLs")
        if not self.front and not self.policies:
            self.policies = [toy.POLICY, newest_warp_run()]
        super().check()
        if self.match_kl:
            first, *others = map(read_config, self.policies)
            if any(first[key] != other[key] for other in others for key in SIZES & first.keys() & other.keys()):
                raise UserError("--match-kl needs policies of one architecture")

    def check_tokens(self):
        super().check_tokens()
        if self.match_kl:
            (first, sure), *others = map(quick_tokenizer, self.policies)
            for name, (tokenizer, exact) in zip(self.policies[1:], others):
                if sure and exact and tokenizer.get_vocab() != first.get_vocab():
                    raise other_vocabulary(name, self.policies[0])


def other_vocabulary(name, first):
    """The UserError for a policy whose KL to the first one is not defined."""
    return UserError(f"{name}: --match-kl needs the vocabulary of {first}")


def newest_warp_run():
    """The WARP run in runs/ that finished last."""
    done = sorted(Path("runs").glob("warp-*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not done:
        raise UserError("no WARP run in runs/ to compare; run train_warp.py first, or name --policies")
    return str(done[-1].parent)


def sft_of(run):
    """The policy that a finished WARP run began with, which its run.json names."""
    options = read_json(f"{run}/run.json").get("options") if Path(run, "run.json").is_file() else None
    if not isinstance(options, dict) or not isinstance(options.get("policy"), str):
        raise UserError(f"--front {run}: no run.json of a WARP run in it")
    if not Path(run, "merged").is_dir():
        raise UserError(f"--front {run}: no merged/ in it; did the run finish?")
    return options["policy"]


if __name__ == "__main__":  # a mistake is told before torch takes its seconds to import
    refuse_mistakes(EvaluateOptions)

import torch

import train_rm
from rlhf_min.batches import shuffle
from rlhf_min.evaluation import (
    format_table,
    judge_policy,
    load_judges,
    match_kl,
    paired_difference,
    summarise,
    sweep_front,
    win_rate,
    z_score,
)
from rlhf_min.models import get_weights, load_policy
from rlhf_min.plots import plot_front
from rlhf_min.precision import resolve_device
from rlhf_min.runlog import RunLog


def draw_prompts(tokenizer, options):
    """`num_prompts` prompts of the file; the same ones for every policy with the same tokenizer."""
    prompts = options.draw_from(*options.load_prompts(tokenizer))
    return shuffle(prompts, torch.Generator().manual_seed(options.seed))[: options.num_prompts]


def compare(judges, options, device):
    """A row per policy; against the first one z-scores, paired differences and win rates under every judge."""
    rows, first, reference = [], None, None
    for name in options.policies:
        policy, tokenizer = load_policy(name, device, options.max_length)
        if reference is None:
            reference, vocabulary = policy, tokenizer.get_vocab()
        same = tokenizer.get_vocab() == vocabulary  # KL needs the same tokens
        prompts = draw_prompts(tokenizer, options)
        matched = {}
        if options.match_kl:
            if not same:
                raise other_vocabulary(name, options.policies[0])
            matched["eta"] = match_kl(policy, tokenizer, prompts, options, reference, options.match_kl)
        columns = judge_policy(policy, tokenizer, prompts, judges, options, reference if same else None)
        row = {"policy": name, **matched, **summarise(columns, judges)}
        first = first or columns
        row |= {f"{judge}_z": z_score(columns[judge], first[judge]) for judge in judges}
        if columns is not first:
            if columns["prompt"] != first["prompt"]:
                raise UserError(f"{name}: its tokenizer cuts other prompts than {options.policies[0]}'s, so answers "
                                "cannot be paired; use prompts of a field 'prompt'")  # fmt: skip
            for judge in judges:
                generator = torch.Generator().manual_seed(options.seed)
                delta, low, high = paired_difference(columns[judge], first[judge], generator)
                row |= {f"{judge}_delta": delta, f"{judge}_delta_low": low, f"{judge}_delta_high": high,
                        f"{judge}_win_rate": win_rate(columns[judge], first[judge])}  # fmt: skip
        rows.append(row)
    return rows


def sweep(run, judges, options, device):
    """The front of a WARP run."""
    policy, tokenizer = load_policy(sft_of(run), device, options.max_length)
    sft = get_weights(policy)
    merged = get_weights(load_policy(f"{run}/merged", device, options.max_length)[0])
    prompts = draw_prompts(tokenizer, options)
    return sweep_front(policy, tokenizer, prompts, judges, options, sft, merged, options.front_points)[0]


@one_line_errors
def main(argv=None):
    options = parse_options(EvaluateOptions, argv)
    options.check()
    device = resolve_device(options)
    log = RunLog(options)
    options.judges = options.judge_specs()
    train_rm.prepare_inputs(options.files(), options.model_names())
    judges = load_judges(options.judges, device)

    if options.front:
        fronts = {run: sweep(run, judges, options, device) for run in options.front}
        rows = [{"run": run, **row} for run, front in fronts.items() for row in front]
    else:
        rows = compare(judges, options, device)
        fronts = {row["policy"]: [row] for row in rows if row["kl"] == row["kl"]}  # KL is NaN across tokenizers
    table = format_table(rows)
    print(f"\n{table}\n\njudges: {', '.join(options.judges)}\n")
    with log.running():
        (log.folder / "table.md").write_text(table + "\n", encoding="utf-8")
        plot_front(fronts, list(judges), log.folder / "front.png")
        log.finish(rows=rows, prompts=options.num_prompts)


if __name__ == "__main__":
    main()

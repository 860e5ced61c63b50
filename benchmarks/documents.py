"""Fill the tables and draw the figures of README and docs from docs/results/*.json, so that no number is typed.

    pip install -e '.[plots,bench]'
    python benchmarks/documents.py
    python benchmarks/documents.py first=runs/warp-1         # makes docs/results/first.json of finished runs first

A result file holds the command, the commit, the machine and the rows of an experiment. A table stands in a document
between <!-- results FUNCTION NAME --> and <!-- end -->; FUNCTION is one of TABLES, or the name of a table in the
result file; NAME is the result file that it reads. Behind a colon may stand the columns to show of a printed table,
or the policies whose samples to show. A test fails where a document says something else than its results.
"""

import functools
import json
import math
import re
import sys
from itertools import groupby, pairwise, product
from pathlib import Path
from textwrap import shorten

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scipy import stats

from benchmarks.ablations import BETAS, CENTRE, CONTRASTS, MUS, save_results
from benchmarks.kl import FORMS, KlOptions
from rlhf_min.evaluation import format_sample, format_table, mean_se
from rlhf_min.oracle import examine, formula
from rlhf_min.support.files import read_json
from rlhf_min.support.plots import draw, plot_front

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- results (\w+) (\w+)(?:: (.*?))? -->\n\n)(?:.*?\n\n)??(<!-- end -->)", re.DOTALL)
NATS = (1.0, 2.0)  # where fronts are compared
WIDE = 4.0  # nats; between points of a front that are further apart no value is read
START, NOTHING = "θ_sft", (math.nan,) * 5
PARTNERS = {  # an arm of WARP: REINFORCE with the same β, the same number of steps and the same reward model
    CENTRE: "REINFORCE, β 0.1, 4T steps", "anchor θ_sft": "REINFORCE, β 0.1, 4T steps",
    "β = 0.2": "REINFORCE, β 0.2, 4T steps", "200 pairs, WARP": "200 pairs, REINFORCE, β 0.1, 4T steps",
    "M = 4": "REINFORCE, β 0.1, 8T steps", "I = 4": "REINFORCE, β 0.1, 8T steps",
    "2T steps": "REINFORCE, β 0.1, 8T steps",
}  # fmt: skip
COMMANDS = {"reinforce": "`train_reinforce.py`", "reinforce_1e-3": "`train_reinforce.py --lr 1e-3`",
            "warp": "`train_warp.py --lr 1e-4`, η = 1"}  # fmt: skip
DRAWN = ("loss", "accuracy", "reward", "kl")  # over the steps
PANELS = {"β = 0": "hacking-0-", "β = .135": "hacking-0.135-"}  # {title: how the names of its runs begin}


def read_results(name):
    """docs/results/NAME.json"""
    return read_json(ROOT / "docs" / "results" / f"{name}.json")


def collect(name, folders):
    """docs/results/NAME.json of finished runs: the rows of their summaries, and what --eval-every wrote on the way."""
    runs, results = [read_json(f"{folder}/run.json") for folder in folders], []
    for folder, run in zip(map(Path, folders), runs):
        tables = read_json(folder / "summary.json")
        path = folder / "metrics.jsonl"  # what trains nothing has none
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        steps = [line for line in lines if line.get("grad_norm") is not None]
        tables["summary"] = {name: value for name, value in tables.items() if isinstance(value, int | float)}
        if steps:
            tables["steps"] = {name: mean_se([line[name] for line in steps])[0] for name in ("grad_norm", "clipped")}
        tables["watched"] = [line for line in lines if line.pop("samples", None)]
        one = run["script"].startswith("train_")  # the lines of a benchmark are those of many trainings
        tables["curve"] = list(curve(lines)) if one else []
        results.append({"commit": run["commit"], "rows": []})
        for table, rows in tables.items():
            for row in rows if isinstance(rows, list) else [rows]:
                if isinstance(row, dict):
                    found = {"run": folder.name, "seed": run["options"]["seed"], "table": table, **row}
                    results[-1]["rows"].append(found)
    starts = ["python" if run["processes"] == 1 else f"torchrun --nproc-per-node {run['processes']}" for run in runs]
    commands = [" ".join([start, run["script"], *run["command"][1:]]) for start, run in zip(starts, runs)]
    save_results(ROOT / "docs" / "results" / f"{name}.json", commands, results, runs[0]["threads"])


def curve(lines, size=20):
    """Means over `size` steps of what is drawn over the steps; m is the number of a run of WARP."""
    for (iteration, m), run in groupby(lines, key=lambda line: (line.get("iteration", 1), line.get("run", 1))):
        run = list(run)
        for start in range(0, max(1, len(run) - size + 1), size):  # no short block at the end
            block = run[start : start + size]
            means = {name: mean_se([line[name] for line in block])[0] for name in DRAWN if name in block[0]}
            yield {"iteration": iteration, "m": m, "step": block[-1]["step"], **means}


# Statistics over seeds


def at_kl(front, start, target, name):
    """The column `name` where the front, which begins in the row `start` at KL 0, reaches `target`; NaN if never.

    Linear in the KL between neighbouring points, and NaN between two that are more than WIDE apart.
    """
    for a, b in pairwise([start, *front]):
        if a["kl"] <= target <= b["kl"] and 0 < b["kl"] - a["kl"] <= WIDE:
            share = (target - a["kl"]) / (b["kl"] - a["kl"])
            return (1 - share) * a[name] + share * b[name]
    return math.nan


def t_interval(differences):
    """(mean, low, high, p) of paired differences: Student's t, 95 %, two-sided p against 0."""
    test = stats.ttest_1samp(differences, 0.0)
    return mean_se(differences)[0], *test.confidence_interval(), test.pvalue


def holm(p_values):
    """Holm's correction, {name: p} → {name: adjusted p}: the i-th smallest of m is multiplied by m − i, i from 0."""
    adjusted, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def by_arm(rows):
    """{arm: {seed: row}}"""
    arms = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    return arms


def values_at(arms, arm, target, name="gold"):
    """{seed: what the arm's front has at this KL}, of the seeds whose front reaches it."""
    found = {}
    for seed, row in arms[arm].items():
        value = at_kl(row["front"], arms[START][seed]["front"][0], target, name)
        if not math.isnan(value):
            found[seed] = value
    return found


def contrasts(arms):
    """{(arm, nats): (mean, low, high, p, Holm's p)} of gold − the centre's gold at the same KL, paired by seed."""
    found = {}
    for arm in [arm for arm in CONTRASTS if arm in arms]:
        for target in NATS:
            centre, values = values_at(arms, CENTRE, target), values_at(arms, arm, target)
            seeds = sorted(centre.keys() & values)
            if len(seeds) == len(arms[arm]):  # where a seed's front is too short, the others would be a selection
                found[arm, target] = t_interval([values[seed] - centre[seed] for seed in seeds])
    named = product([arm for arm in CONTRASTS if arm in arms], NATS)  # one without a value still counts
    adjusted = holm({key: found[key][3] if key in found else 1.0 for key in named})
    return {key: (*value, adjusted[key]) for key, value in found.items()}


# Tables


def ablations(results):
    """What every arm but the grid's ends in, and what its front has at 1 and 2 nats; ± over seeds."""
    arms, rows = by_arm(results), []
    for arm in [arm for arm in arms if not arm.startswith("I = 1, μ")]:
        runs = list(arms[arm].values())
        row = {"arm": arm, "steps": runs[0]["steps"]}
        for name in ("kl", "reward", "gold", "fluency"):
            row[name], row[f"{name}_se"] = mean_se([run["front"][-1][name] for run in runs])
        for target, name in product(NATS, ("reward", "gold")):
            values = list(values_at(arms, arm, target, name).values())
            key = f"{name} at {target:g}"
            row[key], row[f"{key}_se"] = mean_se(values) if len(values) == len(runs) else (None, None)
        rows.append(row)
    return format_table(rows)


def differences(results):
    """The difference of every named arm to the centre: gold at the same KL, 95 % interval, Holm's p."""
    tested, rows = contrasts(by_arm(results)), []
    for arm in CONTRASTS:
        row = {"arm": arm}
        for target in NATS:
            key = f"gold at {target:g}, arm − centre"
            mean, low, high, _, p = tested.get((arm, target), NOTHING)
            row |= {key: mean, f"{key}_low": low, f"{key}_high": high, f"p at {target:g}": p}
        rows.append(row)
    return format_table(rows)


def against_reinforce(results):
    """Gold of WARP − that of plain REINFORCE with as many steps, at the same KL; paired by seed, 95 % intervals."""
    arms, rows = by_arm(results), []
    for arm, partner in PARTNERS.items():
        row = {"WARP": arm, "REINFORCE": partner.removeprefix("REINFORCE, "), "steps": arms[partner][1]["steps"]}
        for target in NATS:
            ours, theirs = values_at(arms, arm, target), values_at(arms, partner, target)
            whole = len(ours) == len(theirs) == len(arms[arm])  # where a front is too short, the rest is a selection
            found = t_interval([ours[seed] - theirs[seed] for seed in ours]) if whole else NOTHING
            key = f"gold at {target:g}, WARP − REINFORCE"
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), found))
        rows.append(row)
    return format_table(rows)


def grid(results):
    """KL at the end of one iteration, a row for each μ, a column for each β."""
    arms, rows = by_arm(results), []
    for mu in MUS:
        row = {"μ": f"{mu:g}"}
        for beta in BETAS:
            runs = arms[f"I = 1, μ {mu:g}, β {beta:g}"].values()
            row[f"β = {beta:g}"], row[f"β = {beta:g}_se"] = mean_se([run["front"][-1]["kl"] for run in runs])
        rows.append(row)
    return format_table(rows)


def forms(results):
    """What each form of the KL term climbs, by the oracle, and what it then does; ± over seeds."""
    rows = []
    for form, runs in by_form(results).items():
        loss, scored_at = FORMS[form]
        beta, temperature = KlOptions().beta, 0.7 if scored_at else 1.0
        report = examine(functools.partial(loss, beta=beta), beta, temperature)
        row = {"the KL term": form, "climbs": formula(report.kl_term)}
        for name in ("reward", "gold", "fluency", "kl"):
            row[name], row[f"{name}_se"] = mean_se([run[name] for run in runs])
        rows.append(row)
    return format_table(rows)


def form_answers(results):
    """The first held-out prompt as each form continues it, at the first seed."""
    found = {form: runs[0]["sample"] for form, runs in by_form(results).items()}
    lines = [("prompt", next(iter(found.values()))["prompt"])]
    lines += [(form, " ".join(sample["completion"].split())) for form, sample in found.items()]
    return "```\n" + "\n".join(f"{name:38}  {shorten(text, 150)}" for name, text in lines) + "\n```"


def by_form(rows):
    """{form: its rows}, in the order of FORMS."""
    return {form: [row for row in rows if row["form"] == form] for form in FORMS}


def front(results):
    """The fronts of WARP runs, and model/, the last θ_init, as the runs printed them."""
    rows = [{"eta": "model/", **row} if row["table"] == "model" else row for row in results]
    return printed(rows, ["front", "model"])


def printed(results, tables, columns=()):
    """The rows of a table as the runs printed them, or these columns; with several runs, each begins with its run."""
    rows = [row for row in results if row["table"] in tables]
    column_of = lambda key: re.sub("_(se|low|high)$", "", key)  # to which an error or an end of an interval belongs
    names = {column_of(key) for row in rows for key in row}
    if not rows or set(columns) - names:
        raise KeyError(f"no run printed {tables} with {columns}")
    shown = set(columns) or names - {"run", "seed", "table"}
    shown |= {"run"} if len({row["run"] for row in rows}) > 1 else set()
    return format_table([{key: row[key] for key in row if column_of(key) in shown} for row in rows])


def trained(results):
    """The policy before a training, from the first run, and after each; a run has the name of its folder."""
    first, rows = results[0]["run"], []
    for row in results:
        if row["table"] == "after" or (row["table"], row["run"]) == ("before", first):
            name = "θ_sft" if row["table"] == "before" else row["run"]
            rows.append({"policy": name} | {key: row[key] for key in row if key not in ("run", "seed", "table", "eta")})
    return format_table(rows)


def clipping(results):
    """Runs named COMMAND-LIMIT-SEED, with the limit 1 and none: where they end, and the paired difference in gold."""
    rows, ends = [], {row["run"]: row for row in results if row["table"] in ("after", "front")}  # of a front, the last
    training = {row["run"]: row for row in results if row["table"] == "steps"}
    groups = {}
    for run in ends:
        groups.setdefault(run.rpartition("-")[0], []).append(run)
    for group, runs in groups.items():
        command, _, limit = group.rpartition("-")
        row = {"command": COMMANDS[command], "clipped to": limit}
        for name in ("reward", "gold", "kl"):
            row[name], row[f"{name}_se"] = mean_se([ends[run][name] for run in runs])
        other = [ends[run.replace("-1-", "-none-")]["gold"] for run in runs]
        difference = [ends[run]["gold"] - gold for run, gold in zip(runs, other)]
        row["gold, 1 − none"], row["gold, 1 − none_se"] = mean_se(difference) if limit == "1" else (None, None)
        row["mean norm"] = mean_se([training[run]["grad_norm"] for run in runs])[0]
        row["share of steps clipped"] = mean_se([training[run]["clipped"] for run in runs])[0] if limit == "1" else None
        rows.append(row)
    return format_table(rows)


def samples(results, columns=()):
    """Prompts and how the answers begin, before and after or of these policies, of the first run that has some."""
    rows = [row for row in results if row["table"] == "samples"]
    texts = [{Path(key).name: row[key] for key in row if key not in ("run", "seed", "table")}
             for row in rows if row["run"] == rows[0]["run"]]  # fmt: skip
    texts = [{name: row[name] for name in ("prompt", *columns)} if columns else row for row in texts]
    lines = "\n\n".join(map(format_sample, texts)).splitlines()
    return "```\n" + "\n".join(line if len(line) <= 250 else line[:249] + "…" for line in lines) + "\n```"


TABLES = {function.__name__: function for function in
          (ablations, differences, against_reinforce, grid, forms, form_answers, front, trained, clipping,
           samples)}  # fmt: skip


def filled(text):
    """A document with its tables as the results have them."""

    def table(block):
        make = TABLES.get(block[2]) or functools.partial(printed, tables=[block[2]])
        columns = {"columns": block[4].split(", ")} if block[4] else {}
        return block[1] + make(read_results(block[3])["rows"], **columns) + "\n\n" + block[5]

    return BLOCK.sub(table, text)


# Figures


def plot_fronts(arms, path):
    """Mean fronts with a band of one standard error over seeds, and where REINFORCE ends for each β."""
    start = [row["front"][0] for row in arms[START].values()]

    def points(fronts, name):
        """Means of x and y and the errors of y, a value for each point of the fronts."""
        x = [mean_se([row["kl"] for row in rows])[0] for rows in zip(*fronts)]
        y, error = zip(*(mean_se([row[name] for row in rows]) for rows in zip(*fronts)))
        return x, y, error

    def fill(panel, name):
        for arm in (CENTRE, "anchor θ_sft", "M = 4", "μ = 0.1"):
            x, y, error = points([[a, *row["front"]] for a, row in zip(start, arms[arm].values())], name)
            panel.plot(x, y, "o-", markersize=3, label="WARP, the centre" if arm == CENTRE else arm)
            panel.fill_between(x, [a - b for a, b in zip(y, error)], [a + b for a, b in zip(y, error)], alpha=0.2)
        for n, marker in ((4, "s"), (8, "D")):  # a path over β instead of η
            paths = zip(*(arms[f"REINFORCE, β {beta}, {n}T steps"].values() for beta in BETAS))
            x, y, error = points([[row["front"][-1] for row in path] for path in paths], name)
            label = f"REINFORCE, {n}T steps, β .05, .1, .2"
            panel.errorbar(x, y, error, marker=marker, color="0.3", linestyle=":", label=label)
        panel.set(xlabel="KL to θ_sft, nats per answer", ylabel=name)

    draw(["reward", "gold"], fill, path, (5.0, 3.8))


def plot_contrasts(arms, path):
    """A forest: the difference of every named arm to the centre, with its interval; red where Holm's p is below .05."""
    tested, panels = contrasts(arms), {f"gold at a KL of {target:g}, arm − centre": target for target in NATS}

    def fill(panel, name):
        found = {arm: tested[arm, panels[name]] for arm in CONTRASTS if (arm, panels[name]) in tested}
        for y, (mean, low, high, _, p) in enumerate(found.values()):
            panel.plot([low, mean, high], [-y] * 3, "|-", color="C3" if p < 0.05 else "0.5", markersize=5)
        panel.axvline(0, color="0.2", linewidth=0.8)
        panel.set_yticks([-y for y in range(len(found))], list(found), fontsize=7)
        panel.set_xlabel(name)

    draw(list(panels), fill, path, (5.4, 4.4))


def plot_grid(arms, path):
    """KL over β (1−μ)/μ, both logarithmic: on one line, if only this product counted."""

    def fill(panel, name):
        for mu in MUS:
            runs = [arms[f"I = 1, μ {mu:g}, β {beta:g}"].values() for beta in BETAS]
            y, error = zip(*(mean_se([run["front"][-1]["kl"] for run in rows]) for rows in runs))
            panel.errorbar([beta * (1 - mu) / mu for beta in BETAS], y, error, marker="o", label=f"μ = {mu:g}")
        panel.set(xscale="log", yscale="log", xlabel="β (1 − μ) / μ", ylabel=name)

    draw(["KL to θ_sft after one iteration"], fill, path, (5.0, 3.8))


def plot_curvature(arms, path):
    """Second differences over η of the centre's front: reward is concave where they are negative, KL convex where
    positive."""

    def fill(panel, name):
        fronts = [[arms[START][seed]["front"][0], *row["front"]] for seed, row in arms[CENTRE].items()]
        bends = [[f[i - 1][name] - 2 * f[i][name] + f[i + 1][name] for f in fronts] for i in (1, 2, 3)]
        means, lows, highs, _ = zip(*map(t_interval, bends))
        errors = [[m - a for m, a in zip(means, lows)], [b - m for m, b in zip(means, highs)]]
        panel.errorbar([0.25, 0.5, 0.75], means, errors, fmt="o", capsize=3)
        panel.axhline(0, color="0.2", linewidth=0.8)
        panel.set(xlabel="η", ylabel=f"second difference of {name}", xticks=[0.25, 0.5, 0.75])

    draw(["reward", "kl"], fill, path, (3.6, 3.2))


def plot_forms(runs, path):
    """Bars of proxy, gold and KL for each form of the KL term, a dot for each seed, 95 % intervals but for the KL."""
    found = by_form(runs)

    def fill(panel, name):
        for y, rows in enumerate(found.values()):
            mean, low, high, _ = t_interval([row[name] for row in rows])
            error = None if name == "kl" else [[mean - low], [high - mean]]  # on a logarithmic axis it says little
            panel.barh(-y, mean, color="C1" if name == "gold" else "C0", alpha=0.6, xerr=error, capsize=2)
            panel.plot([row[name] for row in rows], [-y] * len(rows), ".", color="0.2", markersize=4)
        panel.set_yticks([-y for y in range(len(found))], list(found) if name == "reward" else [], fontsize=7)
        panel.set_xlabel({"reward": "reward (the proxy)", "gold": "gold", "kl": "KL, nats (logarithmic)"}[name])
        if name == "kl":
            panel.set(xscale="log", xlim=(0.5, 1000))

    draw(["reward", "gold", "kl"], fill, path, (4.2, 3.4))


def plot_hacking(rows, path):
    """Reward and gold over √KL while policies train; a thin line a seed, a thick one for the mean at each step."""
    watched = [row for row in rows if row["table"] == "watched"]

    def fill(panel, title):
        for name, color in (("reward", "C0"), ("gold", "C1")):
            lines = {}  # {run: [(√KL, value)]}
            for row in watched:
                if row["run"].startswith(PANELS[title]):
                    lines.setdefault(row["run"], []).append((row["eval_kl"] ** 0.5, row[f"eval_{name}"]))
            for line in lines.values():
                panel.plot(*zip(*line), color=color, alpha=0.35, linewidth=0.8)
            means = [[sum(values) / len(values) for values in zip(*points)] for points in zip(*lines.values())]
            panel.plot(*zip(*means), color=color, linewidth=2, label={"reward": "reward, the proxy"}.get(name, name))
        panel.set(xlabel="√KL to θ_sft", title=title, ylim=(-0.3, 2.1))
        panel.set_xlim(left=0)

    draw(list(PANELS), fill, path, (4.4, 3.4))


def plot_curves(rows, names, path):
    """Columns over the steps: a color a folder, a line for each run of each iteration of WARP."""
    lines = {}  # {(folder, iteration, m): rows}
    for row in rows:
        if row["table"] == "curve" and names[0] in row:
            lines.setdefault((row["run"], row["iteration"], row["m"]), []).append(row)
    folders = list(dict.fromkeys(folder for folder, _, _ in lines))

    def fill(panel, name):
        for (folder, iteration, m), line in lines.items():
            before = (iteration - 1) * line[-1]["step"]
            label = folder if iteration == m == 1 and folders[1:] else None
            points = [(before + row["step"], row[name]) for row in line]
            panel.plot(*zip(*points), linewidth=1.2, color=f"C{folders.index(folder)}", label=label)
        panel.set(xlabel="step", ylabel=name)

    draw(names, fill, path, (4.4, 3.2))


def main():
    for argument in sys.argv[1:]:
        name, folders = argument.split("=")
        collect(name, folders.split(","))
    docs, rows = ROOT / "docs", lambda name: read_results(name)["rows"]
    plot_forms(rows("kl"), docs / "kl.png")
    plot_hacking(rows("hacking"), docs / "tutorial_hacking.png")
    for name, judges, file in (("world", ["reward", "gold"], "front.png"), ("imdb", ["reward"], "imdb_fronts.png")):
        fronts = {}
        for row in rows(name):
            if row["table"] == "front":
                fronts.setdefault(row["run"], []).append(row)
        plot_front(fronts, judges, docs / file)
    plot_curves(rows("imdb_reward_model"), ["loss", "accuracy"], docs / "imdb_reward_model.png")
    plot_curves(rows("imdb"), ["reward", "kl"], docs / "imdb_steps.png")
    arms = by_arm(rows("ablations"))
    plots = {"fronts": plot_fronts, "contrasts": plot_contrasts, "curvature": plot_curvature, "grid": plot_grid}
    for name, plot in plots.items():
        plot(arms, docs / f"ablation_{name}.png")
    for path in [ROOT / "README.md", *docs.glob("*.md")]:
        text = path.read_text("utf-8")
        path.write_text(filled(text), "utf-8")


if __name__ == "__main__":
    main()

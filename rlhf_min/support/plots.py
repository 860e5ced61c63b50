"""Plots, where matplotlib is installed (the `plots` extra)."""


def draw(names, fill, path, size):
    """A panel for each name, which fill(panel, name) draws into; a legend in the first, if its lines have labels."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(size[0] * len(names), size[1]), layout="tight")
    panels = figure.subplots(1, len(names), squeeze=False)
    for panel, name in zip(panels[0], names):
        fill(panel, name)
        panel.grid(alpha=0.3)
    if panels[0][0].get_legend_handles_labels()[1]:
        panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plot_metrics(metrics, names, path, steps=0):
    """A panel per name over the steps, a line per run. Iteration i of `steps` steps begins at (i − 1) · steps."""
    lines = {}
    for row in metrics:
        step = row["step"] + steps * (row.get("iteration", 1) - 1)
        lines.setdefault((row.get("iteration"), row.get("run")), []).append((step, row))

    def fill(panel, name):
        for (iteration, run), rows in lines.items():
            points = [(step, row[name]) for step, row in rows if row.get(name) is not None]
            label = f"run {run}" if run and iteration == 1 else None
            panel.plot(*zip(*points), label=label, color=f"C{(run or 1) - 1}", linewidth=1)
        panel.set(xlabel="step", ylabel=name)

    draw(names, fill, path, (4.0, 3.2))


def plot_front(fronts, judge_names, path):
    """Each judge over the KL to the reference, a line per front {label: rows}, bars of one standard error."""

    def fill(panel, name):
        for label, rows in fronts.items():
            x, y = ([row[key] for row in rows] for key in ("kl", name))
            x_error, y_error = ([row[f"{key}_se"] for row in rows] for key in ("kl", name))
            panel.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o-", capsize=2, label=label)
        rows = max(fronts.values(), key=lambda rows: rows[-1]["kl"])  # the names of all ends would overlap
        for row, shift in ((rows[0], (5, -10)), (rows[-1], (-6, -13))):
            if "eta" in row:
                place = {"xytext": shift, "textcoords": "offset points"}
                panel.annotate(f"η={row['eta']:g}", (row["kl"], row[name]), fontsize=7, **place)
        panel.set(xlabel="KL to the reference, nats per answer", ylabel=name)

    draw(judge_names, fill, path, (4.0, 3.4))

"""Plots, where matplotlib is installed (the `plots` extra)."""


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(names, fill, path, size):
    """A panel for each name, which fill(panel, name) draws into; a legend in the first, if its lines have labels."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, panels = pyplot.subplots(1, len(names), figsize=(size[0] * len(names), size[1]), squeeze=False)
    for panel, name in zip(panels[0], names):
        fill(panel, name)
        panel.grid(alpha=0.3)
    if panels[0][0].get_legend_handles_labels()[1]:
        panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_metrics(metrics, names, path, series=lambda row: ""):
    """One panel per name over the steps; rows with the same `series(row)` make one line."""
    lines = {}
    for row in metrics:
        lines.setdefault(series(row), []).append(row)

    def fill(panel, name):
        for label, rows in lines.items():
            rows = [row for row in rows if row.get(name) is not None]
            shown = label if len(lines) <= 8 else ""  # more would cover the lines, and colours repeat after ten
            panel.plot([row["step"] for row in rows], [row[name] for row in rows], label=shown, linewidth=1)
        panel.set(xlabel="step", ylabel=name)

    draw(names, fill, path, (4.5, 3.4))


def plot_front(fronts, judge_names, path):
    """Each judge over the KL to the reference, a line per front {label: rows}, bars of one standard error."""

    def fill(panel, name):
        for label, rows in fronts.items():
            panel.errorbar([row["kl"] for row in rows], [row[name] for row in rows], fmt="o-", capsize=2, label=label,
                           xerr=[row["kl_se"] for row in rows], yerr=[row[f"{name}_se"] for row in rows])  # fmt: skip
            for row in (rows[0], rows[-1]):
                if "eta" in row:
                    last = row is rows[-1] and len(rows) > 1  # beside which there is no room on the right
                    panel.annotate(f"η={row['eta']:.2g}", (row["kl"], row[name]), xytext=(-4 if last else 4, -10),
                                   textcoords="offset points", fontsize=7, ha="right" if last else "left")  # fmt: skip
        panel.set(xlabel="KL, nats per answer", ylabel=name)

    draw(judge_names, fill, path, (4.5, 3.6))

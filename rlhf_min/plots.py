"""Plots, where matplotlib is installed (the `plots` extra)."""


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot, figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_metrics(metrics, names, path, series=None):
    """One panel per name over the steps; rows with the same `series(row)` make one line."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.4), squeeze=False)
    lines = {}
    for row in metrics:
        lines.setdefault(series(row) if series else "", []).append(row)
    for panel, name in zip(panels[0], names):
        for label, rows in lines.items():
            rows = [row for row in rows if row.get(name) is not None]
            panel.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, linewidth=1)
        panel.set_xlabel("step")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    if series and len(lines) <= 8:  # more would cover the lines, and colours repeat after ten
        panels[0][0].legend(fontsize=8)
    _save(pyplot, figure, path)


def plot_front(fronts, judge_names, path):
    """Each judge over KL to SFT, a line per front {label: rows}, bars of one standard error."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, panels = pyplot.subplots(1, len(judge_names), figsize=(4.5 * len(judge_names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], judge_names):
        for label, rows in fronts.items():
            panel.errorbar([row["kl"] for row in rows], [row[name] for row in rows], fmt="o-", capsize=2, label=label,
                           xerr=[row["kl_se"] for row in rows], yerr=[row[f"{name}_se"] for row in rows])  # fmt: skip
            for row in (rows[0], rows[-1]):
                if "eta" in row:
                    panel.annotate(f"η={row['eta']:.2g}", (row["kl"], row[name]), xytext=(4, -10),
                                   textcoords="offset points", fontsize=7)  # fmt: skip
        panel.set_xlabel("KL to SFT, nats per answer")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    _save(pyplot, figure, path)


def plot_growth(rows, path):
    """Seconds over each factor, in double logarithms, where a straight line of slope 1 is linear growth."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    figure, panels = pyplot.subplots(1, len(factors), figsize=(3.6 * len(factors), 3.4), squeeze=False)
    for panel, factor in zip(panels[0], factors):
        points = [(row["value"], row["seconds"]) for row in rows if row["factor"] == factor]
        values, seconds = zip(*points)
        panel.loglog(values, seconds, "o-", label="measured")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", label="linear")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set_xlabel(factor)
        panel.set_ylabel("seconds")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    _save(pyplot, figure, path)

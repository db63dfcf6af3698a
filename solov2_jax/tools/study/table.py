"""A study's results as a table: mean and spread of each lever, and of its gain by seed and fold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from solov2_jax.io import write_json, write_text
from solov2_jax.tools.study.design import Design, Trial
from solov2_jax.tools.study.trial import read_outcome

RESULTS, TABLE = "study.json", "study.md"


def collect(study: Path, design: Design, metric: str, failed: Mapping[str, str]) -> dict[str, Any]:
    """Returns the study's results: every run, and a row for each lever.

    A gain is a run's metric minus the plain recipe's of the same seed and fold; spreads are
    standard deviations of the sample, None for a single run.

    Args:
      failed: why runs have failed, by name.
    """
    trials = design.trials()
    outcomes = {trial.name: read_outcome(study, trial) for trial in trials}
    values: dict[tuple[str, int, int], float] = {}
    runs = []
    for trial in trials:
        outcome = outcomes[trial.name]
        value = outcome["metrics"].get(metric) if outcome else None
        if value is not None:
            values[trial.lever.name, trial.seed, trial.fold] = value
        state = "finished" if outcome else "failed" if trial.name in failed else "to do"
        runs.append({"name": trial.name, "state": state, **(outcome or {})})
        if trial.name in failed and not outcome:
            runs[-1]["error"] = failed[trial.name]
    rows = [_row(lever.name, design, values, outcomes) for lever in design.levers]
    return {"metric": metric, "equal_time": design.equal_time, "rows": rows, "runs": runs}


def _row(
    name: str,
    design: Design,
    values: Mapping[tuple[str, int, int], float],
    outcomes: Mapping[str, dict[str, Any] | None],
) -> dict[str, Any]:
    plain = design.levers[0].name
    trials: list[Trial] = [t for t in design.trials() if t.lever.name == name]
    own = {(t.seed, t.fold): values.get((name, t.seed, t.fold)) for t in trials}
    found = [v for v in own.values() if v is not None]
    gains = [
        v - values[plain, *place]
        for place, v in own.items()
        if v is not None and (plain, *place) in values and name != plain
    ]
    done = [o for t in trials if (o := outcomes[t.name])]
    seconds = [o["seconds"] for o in done]
    return {
        "lever": name,
        "runs": len(trials),
        "finished": len(done),
        "mean": _mean(found),
        "spread": _spread(found),
        "gain": _mean(gains),
        "gain_spread": _spread(gains),
        "seconds": _mean(seconds),
        "steps": _mean([o["last_step"] for o in done if "last_step" in o]),
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def format_table(results: Mapping[str, Any]) -> str:
    """Returns the rows as Markdown."""
    metric, steps = results["metric"], results["equal_time"]
    lines = [
        f"| lever | runs | {metric}, mean ± spread | gain ± spread | seconds a run |"
        + " steps |" * steps,
        "|---|---:|---:|---:|---:|" + "---:|" * steps,
    ]
    for row in results["rows"]:
        cells = [
            row["lever"].replace("|", "\\|"),
            f"{row['finished']} of {row['runs']}",
            _with_spread(row["mean"], row["spread"], sign=""),
            _with_spread(row["gain"], row["gain_spread"], sign="+"),
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        ]
        if steps:
            cells.append("" if row["steps"] is None else f"{row['steps']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    failed = [run for run in results["runs"] if run["state"] == "failed"]
    lines += ["", *[f"{run['name']} failed: {run['error']}" for run in failed]]
    return "\n".join(lines).rstrip() + "\n"


def _with_spread(value: float | None, spread: float | None, sign: str) -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + (f" ± {spread:.4f}" if spread is not None else "")


def write_table(study: Path, results: Mapping[str, Any]) -> str:
    """Writes study.json and study.md; returns the table."""
    table = format_table(results)
    write_json(dict(results), study / RESULTS)
    write_text(table, study / TABLE)
    return table

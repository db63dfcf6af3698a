"""Measures which settings help on your data: seeds, folds, one lever at a time, a table.

    solov2 study --data FOLDER --workdir studies/cells --seeds 3 --epochs 12 \\
        --lever "paste: augment.paste_prob=0.5" --lever optim.layer_decay=0.8
    solov2 study --workdir studies/cells --only plain/seed0_fold0

The recipe as it is, called plain, is trained first, with each seed on each fold; then each
lever, the recipe with these keys changed. What is compared is `train.best_metric` of each
run's best evaluation, seed by seed and fold by fold. study.md and study.json in the workdir
are written after every run. A lever that has not even --hopeless of the plain recipe's metric
after --judge_from of the run ends there. With --equal_time a lever whose steps are slower gets
fewer of them: steps of both are timed before the first run.

The same command goes on where it was stopped; more levers and seeds may be added to it.
`--only RUN` trains a single run of a study that was begun, such as plain/seed0_fold0, so that
several machines can share a folder.

Exit code 0: all runs are finished, or it was stopped by a signal; 1: some have failed; 2: an
error that the one line `error: ...` explains.
"""

import contextlib
import functools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solov2_jax.config import given_keys, load_config
from solov2_jax.config_schema import AUTO, several, share, switch, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app, own_data
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.tools.cli.init_weights import adopt
from solov2_jax.tools.importers.kept import forgotten_if_refused

if TYPE_CHECKING:
    from solov2_jax.tools.study.design import Design

_WORKDIR = Flag("workdir", text(), "The study's folder.", required=True)
_CONFIG = Flag("config", text(), "Config file of the recipe; keys: configs/base.py.")
_SEEDS = Flag("seeds", whole(3, 1, 1000), "Runs of each lever that differ in the seed only.")
_FOLDS = Flag(
    "folds",
    whole(1, 1, 1000),
    "Parts that all images are cut into, each the validation part once. 1: the data's own parts.",
)
_LEVERS = Flag(
    "lever",
    several((), text("", form=(r"[^\0]+", "key=value"))),
    'Keys to change together: "key=value key=value", with a name before a colon if you like.',
    repeated=True,
)
_HOPELESS = Flag("hopeless", share(0.5), "Least share of the plain recipe's metric. 0: any.")
_JUDGE_FROM = Flag("judge_from", share(0.3), "Share of a run before which it is not judged.")
_EQUAL_TIME = Flag(
    "equal_time",
    switch(False),
    "Make a lever's runs longer or shorter, so that they train for the plain recipe's time.",
)
_ONLY = Flag("only", text(), "Train this run alone, of a study that was begun.")
FLAGS = (
    *(_WORKDIR, _CONFIG, *own_data.FLAGS, _SEEDS, _FOLDS, _LEVERS, _HOPELESS, _JUDGE_FROM),
    *(_EQUAL_TIME, _ONLY),
)


def main(overrides: list[str]) -> None:
    from solov2_jax.tools.study import design as designs

    study = Path(_WORKDIR.value)
    if _ONLY.value:
        from solov2_jax.tools.study.trial import run_trial

        if given := [f.name for f in FLAGS if f.present and f not in (_WORKDIR, _ONLY)]:
            raise InputError(f"--{given[0]} does not go with --only: the study's folder says it")
        design = designs.read_design(study)
        run_trial(study, design, design.trial(_ONLY.value))
        return
    levers = designs.parse_levers(_LEVERS.value)
    design = designs.Design(
        levers=levers,
        seeds=_SEEDS.value,
        folds=_FOLDS.value,
        hopeless=_HOPELESS.value,
        judge_from=_JUDGE_FROM.value,
        equal_time=_EQUAL_TIME.value,
    )
    if (study / "checkpoints").exists():
        raise InputError(f"--workdir {study}: is a run's folder; give the study one of its own")
    if own_data.EPOCHS.present:
        overrides = [*overrides, f"--config.train.epochs={own_data.EPOCHS.value:g}"]
    # Before anything is written, as far as one can know without the data.
    preset = load_config(_CONFIG.value or own_data.PRESET, overrides)
    designs.check_levers(levers, preset, equal_time=design.equal_time)
    with forgotten_if_refused(study / "data", has_begun=(study / designs.DESIGN).exists):
        config = _recipe(overrides, str(study))
        designs.check_levers(levers, config, equal_time=design.equal_time, weights=True)
        designs.keep_design(study, design, config, own_data.GROUP.value)
    sys.exit(_run_all(study, design, config.train.best_metric))


def _recipe(overrides: list[str], study: str) -> Any:
    """Returns the config that the flags describe; keeps in the folder what --data merged."""
    if own_data.DATA.value:
        config = own_data.own_config(_CONFIG.value, study, overrides, write=True)
    else:
        for flag in own_data.FLAGS:
            if flag.present and flag not in (own_data.EPOCHS, own_data.GROUP):
                raise InputError(f"--{flag.name} goes with --data")
        if not _CONFIG.value:
            raise InputError("--config is missing, or --data; see --help")
        config = load_config(_CONFIG.value, overrides)
        if config.init_from:
            adopt(config, given_keys(overrides), study)
    if config.train.batch_size == AUTO:
        raise InputError(
            "train.batch_size = auto: all runs of a study need one batch; give its number"
        )
    return config


def _run_all(study: Path, design: "Design", metric: str) -> int:
    """Trains what is to be trained, a process for each run; returns the exit code."""
    from solov2_jax.tools.study.table import collect, write_table
    from solov2_jax.tools.study.trial import read_outcome

    failed: dict[str, str] = {}
    table = write_table(study, collect(study, design, metric, failed))
    trials = design.trials()
    with _stopping() as stop:
        for number, trial in enumerate(trials, start=1):
            if read_outcome(study, trial):
                continue
            app.echo(f"run {number} of {len(trials)}: {trial.name}")
            error = stop.run(study, trial.name)
            if stop.wanted:
                app.echo("stopped; the same command goes on")
                return 0
            if error or not read_outcome(study, trial):
                failed[trial.name] = error or "it ended before its last step"
                app.echo(f"{trial.name} failed: {failed[trial.name]}")
            table = write_table(study, collect(study, design, metric, failed))
    app.echo(f"\n{table}\n{study / 'study.md'}")
    return 1 if failed else 0


class _Child:
    """The process of the present run, which a signal stops with this one."""

    def __init__(self):
        self.wanted = False
        self._process: subprocess.Popen[str] | None = None

    def run(self, study: Path, name: str) -> str:
        """Runs one run to its end; returns the line of its error, "" without one."""
        command = [sys.executable, "-m", "solov2_jax", "study"]
        command += ["--workdir", str(study), "--only", name]
        command += [f"--{f.name}={f.value}" for f in app.PLATFORM if f.present]
        if self.wanted:
            return ""
        # In a group of its own: Ctrl-C reaches this one, whose one signal lets it save.
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
        )
        last = ""
        for line in self._process.stderr or ():
            sys.stderr.write(line)
            last = line.strip() or last
        code = self._process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return (last.removeprefix("error: ") or f"exit code {code}") if code else ""

    def stop(self, number: int, frame: Any) -> None:
        del number, frame
        self.wanted = True
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _stopping() -> Iterator[_Child]:
    """Hands SIGTERM and SIGINT on to the present run, which saves and ends."""
    child = _Child()
    usual = {s: signal.signal(s, child.stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield child
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


run = functools.partial(app.run, main, FLAGS)

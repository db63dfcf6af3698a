"""Flags that several commands have: the model, the views of an image, the processes."""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from solov2_jax.config_schema import choice, number, several, share, switch, text, whole
from solov2_jax.io import InputError
from solov2_jax.tools.cli import app
from solov2_jax.tools.cli.flags import Flag

if TYPE_CHECKING:
    import numpy as np

    from solov2_jax.data.pixel_format import PixelFormat
    from solov2_jax.inference.predictor import Predictor
    from solov2_jax.tools.export.exported import ExportedPredictor
    from solov2_jax.tools.labelling.pictures import PictureFolder
    from solov2_jax.tools.multiview.tiling import TileOptions
    from solov2_jax.tools.multiview.tta import TtaOptions

log = logging.getLogger(__name__)

WORKDIR = Flag("workdir", text(), "Folder of a training run, or hf:USER/REPO[@REVISION].")
CHECKPOINT = Flag("checkpoint", text("last"), "Of the workdir: last, best or a step.")
CONFIG = Flag("config", text(), "Config file or a shipped config's name, with --weights.")
WEIGHTS = Flag("weights", text(), "Weights file, or a name such as hf:USER/REPO, with --config.")
EXPORT = Flag("model", text(), "What `solov2 export` wrote: its folder, or a file such as x.onnx.")
# What `select` and `pseudo` do.
PICTURES = Flag(
    "input", text(), "A folder with pictures, also below it, or a quoted pattern.", required=True
)
OUTPUT = Flag("output", text(), "Folder to write to.", required=True)
BATCH_SIZE = Flag(
    "batch_size", whole(1, 1, 4096), "Pictures of one padded shape per batch, on each device."
)
OVERWRITE = Flag("overwrite", switch(False), "Replace files that this command did not write.")
# Keys and groups that nothing reads but training.
_OF_TRAINING = ("augment.", "data.train.", "init_from=", "loss.", "optim.", "seed=", "train.")
_OF_TRAINING += ("targets.", "input.min_sizes_train", "input.max_size_train", "input.flip_prob")
_SHOWN_PROBLEMS = 5  # in the closing error; each was logged
MODEL = (WORKDIR, CHECKPOINT, CONFIG, WEIGHTS)

BEST = "best"


class ScoreFlag(Flag):
    """A least score, or "best": that of each class with the largest F1 on validation."""

    def parse(self, word: str) -> Any:
        return BEST if word == BEST else super().parse(word)


SCORE = ScoreFlag(
    "score",
    share(0.3),
    "Least score of a detection; best: for each class the one that was best on the run's "
    "validation data (thresholds.json of --workdir, or in the metadata of --model).",
)

TILE = Flag("tile", whole(0, high=65_536), "Side of the tiles to cut images into. 0: do not.")
OVERLAP = Flag("tile_overlap", number(0.25, 0, below=1), "Least overlap, as a share of a tile.")
TILE_WHOLE = Flag("tile_whole", switch(False), "Predict on the whole image too, for large objects.")
TTA = Flag("tta", several((), text()), "Views to average: 'flip', scales, or 'flip,0.8,1,1.25'.")
VIEWS = (TILE, OVERLAP, TILE_WHOLE, TTA)

MODE = Flag(
    "distributed",
    choice("auto", ("auto", "on", "off")),
    "Whether this is one of several processes. auto: if Slurm's srun, Open MPI, GKE or "
    "--coordinator says so; on: always, with whatever JAX finds (TPU pods need this).",
)
COORDINATOR = Flag("coordinator", text(), "HOST:PORT of process 0; '' finds it out.")
NUM_PROCESSES = Flag("num_processes", whole(1, 1), "With --coordinator.", optional=True)
PROCESS_ID = Flag("process_id", whole(0), "0, 1, ...; with --coordinator.", optional=True)
HEARTBEAT = Flag(
    "heartbeat_timeout", whole(100, 5, 1_000_000), "Seconds until a silent process counts as dead."
)
PROCESSES = (MODE, COORDINATOR, NUM_PROCESSES, PROCESS_ID, HEARTBEAT)


def check_model(score: Flag = SCORE, exported: Sequence[Flag] = ()) -> None:
    """Raises an InputError unless the flags name one model.

    Args:
      score: the command's, if it has one.
      exported: flags for what stands in an export already.
    """
    if CHECKPOINT.present and WEIGHTS.value and not WORKDIR.value:
        raise InputError("--checkpoint goes with --workdir: a weights file has one network")
    if EXPORT.value:
        others = [f"--{flag.name}" for flag in (*MODEL, TILE, TTA, *exported) if flag.present]
        if others:
            raise InputError(f"--model is a network by itself and goes without {others[0]}")
    given = (bool(WORKDIR.value), bool(CONFIG.value), bool(WEIGHTS.value))
    if not EXPORT.value and given not in ((True, False, False), (False, True, True)):
        raise InputError("give either --workdir, or --config and --weights together")
    if score.value == BEST and not (WORKDIR.value or EXPORT.value):
        raise InputError(
            "--score best needs --workdir, a run whose evaluation found the scores, or --model, "
            "exported from one"
        )
    if score.value == BEST and CHECKPOINT.value.endswith(":raw"):
        raise InputError("--score best is of the weights that are evaluated, not of :raw ones")


def least_scores(
    predictor: "Predictor | ExportedPredictor", score: Flag = SCORE
) -> "float | np.ndarray":
    """Returns the least score of a detection, or that of each label, as --score says."""
    if score.value != BEST:
        return score.value
    from solov2_jax.pretrained import local_folder
    from solov2_jax.tools.report.thresholds import describe_scores, read_thresholds

    names, ids = predictor.class_names, predictor.category_ids
    if EXPORT.value:
        scores = getattr(predictor, "best_scores", None)
        if scores is None:
            raise InputError(
                f"--score best: {EXPORT.value} holds no thresholds; evaluate the run it is from, "
                "and export it again"
            )
    else:
        step = getattr(predictor, "step", None)
        if step is None:
            raise InputError(f"--score best: {WORKDIR.value} records no step of its weights")
        scores = read_thresholds(local_folder(WORKDIR.value), step, names, ids)
    log.info("--score best: %s", describe_scores(names, scores))
    if TILE.value or TTA.value:
        log.warning("--score best was found without --tile and --tta; their scores may differ")
    return scores


def known_best_scores(predictor: "Predictor") -> tuple[float, ...] | None:
    """Returns what `--score best` takes of --workdir; None where its evaluations found none."""
    from solov2_jax.pretrained import local_folder
    from solov2_jax.tools.report.thresholds import has_thresholds, read_thresholds

    if not WORKDIR.value or CHECKPOINT.value.endswith(":raw") or predictor.step is None:
        return None
    folder, step = local_folder(WORKDIR.value), predictor.step
    if not has_thresholds(folder, step):
        return None
    scores = read_thresholds(folder, step, predictor.class_names, predictor.category_ids)
    return tuple(scores.tolist())


def load_export(overrides: Sequence[str]) -> "ExportedPredictor":
    """Returns the predictor of --model."""
    from solov2_jax.tools.export.load import open_export

    if overrides:
        raise InputError(f"{overrides[0]}: an exported network keeps its settings; export again")
    return open_export(EXPORT.value)


def load_predictor(overrides: list[str]) -> "Predictor":
    """Returns the predictor that the flags name, --model aside."""
    from solov2_jax.inference.predictor import Predictor

    check_model()
    for override in overrides:
        if override.removeprefix("--config.").startswith(_OF_TRAINING):
            raise InputError(f"{override} has no effect: this command does not train")
    if WORKDIR.value:
        return Predictor.from_workdir(WORKDIR.value, CHECKPOINT.value, overrides)
    return Predictor.from_weights(WEIGHTS.value, CONFIG.value, overrides)


def load_for_all(overrides: list[str]) -> "Predictor | ExportedPredictor":
    """Returns the model that the flags name, in each of several processes.

    Raises:
      AgreedError: in all of several processes, what is wrong with the flags or files in any.
    """
    from solov2_jax import distributed
    from solov2_jax.pretrained import load_run_config

    load = load_export if EXPORT.value else load_predictor
    if WORKDIR.value and distributed.rank()[1] > 1:
        with distributed.fail_together():
            load_run_config(WORKDIR.value, overrides)
        return load(overrides)  # the first one reads the checkpoint, for all
    with distributed.fail_together():
        return load(overrides)


def end_with_problems(pictures: "PictureFolder", others: str) -> None:
    """Ends the command with exit code 1 where some pictures could not be read.

    Args:
      others: what became of the rest.
    """
    if problems := pictures.problems:
        shown = " | ".join(problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        rest = f" | and {more} more, see above" if more > 0 else ""
        sys.stdout.flush()
        total = len(pictures.names) + pictures.num_unusable
        text = f"{len(problems)} of {total} pictures could not be read, {others}: {shown}{rest}"
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(1)


def model_pixels(overrides: list[str]) -> "PixelFormat":
    """Returns what the pictures of the model hold, before its weights are read."""
    from solov2_jax.config import load_config
    from solov2_jax.data.build import pixel_format
    from solov2_jax.data.pixel_format import RGB
    from solov2_jax.pretrained import load_run_config

    package = logging.getLogger("solov2_jax")
    package.disabled = True  # what it tells is told when the model is loaded
    try:
        if EXPORT.value:
            return load_export(overrides).input.pixels
        if WORKDIR.value:
            return pixel_format(load_run_config(WORKDIR.value, overrides))
        return pixel_format(load_config(CONFIG.value, overrides))
    except InputError:  # raised again when the model is loaded, after what concerns the input
        return RGB
    finally:
        package.disabled = False


def on_local_devices(predictor: "Predictor", most: int = 0) -> "Predictor":
    """Returns the predictor on this process's devices, at most so many; 0: all."""
    import jax

    devices = jax.local_devices()
    return predictor.on_devices(devices[: most or None])


def view_options() -> "tuple[TtaOptions | None, TileOptions | None]":
    """Returns test-time augmentation and tiles by the flags, None where not wanted."""
    tiles = tta = None
    if TILE.value:
        from solov2_jax.tools.multiview.tiling import TileOptions

        tiles = TileOptions(TILE.value, OVERLAP.value, TILE_WHOLE.value)
    elif OVERLAP.present or TILE_WHOLE.value:
        raise InputError("--tile_overlap and --tile_whole need --tile, such as 512")
    if TTA.value:
        from solov2_jax.tools.multiview.tta import TtaOptions

        scales = [_scale(word) for word in TTA.value if word != "flip"]
        tta = TtaOptions("flip" in TTA.value, tuple(scales) or (1.0,))
    return tta, tiles


def _scale(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(
            f"--tta {word}: neither 'flip' nor a scale; write for example --tta=flip,0.8,1,1.25"
        ) from None


def run_joined(main: app.Main, overrides: list[str]) -> None:
    """Runs a command, as one of several processes if the flags or the cluster say so.

    Only the first one's log is shown.
    """
    from solov2_jax import cluster, distributed

    joining = cluster.Joining(
        mode=MODE.value,
        coordinator=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
        heartbeat_timeout=HEARTBEAT.value,
    )
    if not cluster.initialize(joining):
        main(overrides)
        return
    with contextlib.ExitStack() as stack:
        if not distributed.is_primary():
            for handler in logging.getLogger("solov2_jax").handlers:
                handler.setLevel(logging.WARNING)
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        with distributed.abort_together(() if app.DEBUG.value else app.USER_ERRORS):
            main(overrides)

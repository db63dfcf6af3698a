"""Images -> predictions, with a trained network.

Source: detectron2 engine/defaults.py, DefaultPredictor; AdelaiDet
adet/modeling/solov2/solov2.py, inference. Different here: boxes are the masks' own, a
detection whose mask has no pixel left at the original size is dropped, and memory is
bounded whatever the image shows.
"""

import copy
import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from solov2_jax import pretrained
from solov2_jax.checkpoint import load_workdir_config, read_classes, restore_variables
from solov2_jax.config import given_keys, input_statistics, load_config
from solov2_jax.data.buckets import Bucket, check_buckets
from solov2_jax.data.build import pixel_format
from solov2_jax.distributed import mesh_of, replicated
from solov2_jax.inference.pasting import BatchPaste, StartedBatch, paste_image, start_paste
from solov2_jax.inference.prediction import Prediction
from solov2_jax.inference.preprocess import (
    InputOptions,
    default_buckets,
    make_batches,
    make_example,
    padded_shape,
)
from solov2_jax.inference.programs import (
    DetectOptions,
    DetectPrograms,
    compile_detect,
    compile_kernel_transform,
)
from solov2_jax.models import AUXILIARY, build_model
from solov2_jax.structs import Detections
from solov2_jax.weights.convert import fit, network_shapes
from solov2_jax.weights.hub import open_weights
from solov2_jax.weights.settings import adopt_settings, check_settings

PyTree = Any
Image = np.ndarray | str | os.PathLike[str]
log = logging.getLogger(__name__)


class Predictor:
    """Turns images into predictions at their original size.

    One program is compiled for each of `input_options.buckets` and batch size, when it is
    first needed or by `compile`; which of them an image goes into changes no result.
    Predictors of one model with the same options share them.
    All methods may be called from several threads.

    Args:
      model: `model.apply(variables, image, extent)` gives `Outputs`, see `SOLOv2`; hashable,
        with a `matmul_precision`.
      class_names, category_ids: of the labels 0..K-1.
      transform_kernels: variables -> what the model is applied with instead, once; see
        `programs.compile_kernel_transform`.
    """

    # Of several devices: their mesh, their programs, and a copy of the variables on each.
    mesh: Mesh | None = None
    _split: tuple[DetectPrograms, PyTree] | None = None
    _slots = 0  # detections of an image, where they are known before any is made
    keypoint_names: tuple[str, ...] = ()  # (): no key points are predicted
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of them, from 1

    def __init__(
        self,
        model: Any,
        variables: PyTree,
        input_options: InputOptions,
        detect_options: DetectOptions,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        transform_kernels: Callable[[PyTree], PyTree] | None = None,
    ):
        self.input = input_options
        self.options = detect_options
        self._slots = detect_options.max_per_image
        self.mask_threshold = detect_options.mask_threshold
        self.class_names = tuple(class_names)
        self.category_ids = tuple(int(i) for i in category_ids)
        self.model = model
        self.variables = variables
        placed = jax.device_put(variables)
        # On the device, as the model is applied with them.
        self.placed = transform_kernels(placed) if transform_kernels else placed
        mean, std = input_options.mean, input_options.std
        self._detect = compile_detect(model, mean, std, detect_options)
        self._compile_detect = functools.partial(compile_detect, model, mean, std, detect_options)
        # From this score on, detections that a limit cuts are told of; see `report_limits`.
        self.limit_score = math.inf
        self._reported_limits: set[str] = set()
        self.step: int | None = None  # of the run's checkpoint that the weights are from

    @classmethod
    def from_workdir(
        cls,
        workdir: str | os.PathLike[str],
        checkpoint: str = "last",
        overrides: Sequence[str] = (),
    ) -> "Predictor":
        """Returns the predictor of a training run.

        Args:
          workdir: its folder, or what `from_pretrained` takes, with "hf:" before a repository.
          checkpoint: "last", "best" or a step.
          overrides: of its config, such as "--config.input.min_size_test=640".
        """
        folder = pretrained.local_folder(workdir)
        if pretrained.is_pretrained(folder):
            pretrained.check_checkpoint(workdir, checkpoint)
            return cls.from_pretrained(folder, overrides)
        config = load_workdir_config(folder, overrides)
        names, ids = read_classes(folder)
        variables, step = restore_variables(folder, checkpoint)
        log.info("%s: weights of step %d", workdir, step)
        model = build_model(config, len(names))
        predictor = build_predictor(config, model, variables, names, ids)
        predictor.step = step
        return predictor

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], overrides: Sequence[str] = ()
    ) -> "Predictor":
        """Returns the predictor of a repository of the hub that `solov2 hub push` wrote.

        Args:
          name: "USER/REPO" or "USER/REPO@REVISION"; or a folder: `solov2 hub pull`'s or a run's.
          overrides: of its config, such as "--config.test.score_threshold=0.2".

        Raises:
          InputError: naming what is missing, damaged, closed or unknown.
        """
        folder = pretrained.find_pretrained(name)
        if not pretrained.is_pretrained(folder):
            return cls.from_workdir(folder, overrides=overrides)
        found = pretrained.read_pretrained(folder, overrides)
        model = build_model(found.config, len(found.class_names))
        shapes = network_shapes(found.config, len(found.class_names))
        variables, _ = fit(found.weights, shapes, strict=True)
        names, ids = found.class_names, found.category_ids
        predictor = build_predictor(found.config, model, variables, names, ids)
        predictor.step = pretrained.read_step(folder)
        return predictor

    @classmethod
    def from_weights(
        cls,
        weights: str | os.PathLike[str],
        config: Any,
        overrides: Sequence[str] = (),
    ) -> "Predictor":
        """Returns the predictor of a weights file that fills the network of a config.

        The number of classes is the file's. Class names too, where it has them; else
        they are "class 1", ... and the category ids are 1, 2, ...

        Args:
          weights: a file, or a name such as "hf:USER/REPO/FILE", see `weights.hub`.
          config: a config file, such as "configs/r50_3x.py", whose channel order, mean, std
            and stride become the weights' unless they are given, or a loaded config.
          overrides: of a config file, such as "--config.input.min_size_test=640".
        """
        from_file = isinstance(config, str | os.PathLike)
        if from_file:
            config = load_config(os.fspath(config), overrides)
        elif overrides:
            raise ValueError(f"overrides {list(overrides)} need a config file's path")
        weights = os.fspath(weights)
        read = open_weights(weights, key="weights")
        line = from_file and adopt_settings(read.settings, config, given_keys(overrides), weights)
        if line:
            log.info("%s", line)
        num_classes = read.num_classes
        if num_classes is None:
            raise ValueError(
                f"{weights} has no class layer (a backbone only?), so it cannot "
                "predict; give weights of a whole SOLOv2, or train from these with "
                "--config.init_from"
            )
        if config.model.num_classes not in (0, num_classes):
            raise ValueError(
                f"model.num_classes is {config.model.num_classes}, but {weights} has "
                f"{num_classes} classes; set it to 0 to take the file's"
            )
        check_settings(read.settings, config, weights)
        model = build_model(config, num_classes)
        variables, _ = fit(read, network_shapes(config, num_classes), strict=True)
        names = read.class_names or [f"class {i + 1}" for i in range(num_classes)]
        return build_predictor(config, model, variables, names)

    def __call__(self, image: Image) -> Prediction:
        """Returns the prediction of one image: an array as `input.pixels` says, RGB
        uint8 [H, W, 3] where it says nothing else, or a path."""
        (prediction,) = self.predict_images([image])
        return prediction

    def predict_images(self, images: Iterable[Image], batch_size: int = 1) -> Iterator[Prediction]:
        """Yields the prediction of each image, in order; `image_id` counts from 0.

        Args:
          images: RGB uint8 [H, W, 3] (see `input.pixels`), or paths.
          batch_size: of so many images in a row, those that have one padded shape are
            computed together.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        waiting: list[dict[str, np.ndarray]] = []
        for number, image in enumerate(images):
            waiting.append(self.preprocess(image, number))
            if len(waiting) == batch_size:
                yield from self._in_order(waiting, batch_size)
                waiting = []
        yield from self._in_order(waiting, batch_size)

    def preprocess(self, image: Image, image_id: int = 0) -> dict[str, np.ndarray]:
        """Returns one image as the network's input, without a batch axis; no JAX.

        `preprocess.make_batches` makes batches of them for `predict_batch`.
        """
        return make_example(image, image_id, self.input)

    def padded_shape(self, height: int, width: int) -> Bucket:
        """Returns the padded (height, width) at which an image goes through."""
        return padded_shape(height, width, f"{height} x {width}", self.input)[1]

    def with_shapes(self, shapes: Sequence[Bucket]) -> "Predictor":
        """Returns a predictor of the same programs for these padded shapes only."""
        changed = copy.copy(self)
        changed.input = replace(self.input, buckets=tuple(shapes))
        return changed

    @property
    def num_devices(self) -> int:
        """Over how many devices a batch is split; it has a multiple of so many images."""
        return 1 if self.mesh is None else self.mesh.devices.size

    def on_devices(self, devices: Sequence[Any]) -> "Predictor":
        """Returns a predictor that splits batches over these devices of this process.

        A batch whose number of images is no multiple of theirs is computed by the first.
        """
        log.info("prediction on %d device(s): %s", len(devices), devices[0].device_kind)
        changed = self.on_first_device()
        if len(devices) == 1:
            changed.placed = jax.device_put(self.placed, devices[0])
            return changed
        changed.mesh = mesh_of(devices)
        copies = jax.device_put(self.placed, replicated(changed.mesh))
        changed._split = self._compile_detect(changed.mesh), copies
        changed.placed = jax.tree.map(lambda x: x.addressable_data(0), copies)
        return changed

    def on_first_device(self) -> "Predictor":
        """Returns a predictor that computes all on the first of its devices."""
        changed = copy.copy(self)
        changed.mesh = changed._split = None
        return changed

    def _is_split(self, batch_size: int) -> bool:
        return self.mesh is not None and batch_size % self.num_devices == 0

    def _programs(self, batch_size: int) -> tuple[DetectPrograms, PyTree]:
        """Returns the programs of a batch, and the variables that they take."""
        if self._is_split(batch_size):
            assert self._split is not None
            return self._split
        return self._detect, self.placed

    def compile(self, shapes: Iterable[Bucket], batch_size: int = 1, *, wait: bool = True) -> None:
        """Compiles ahead, for padded (height, width) shapes, side by side.

        Args:
          wait: until all are there; else images wait for the program that they need.
        """
        pixels = self.input.pixels
        programs, variables = self._programs(batch_size)
        started = [
            programs.start(variables, (batch_size, height, width, pixels.channels), pixels.dtype)
            for height, width in shapes
        ]
        for program in started if wait else []:
            program.result()

    def predict_batch(self, batch: Mapping[str, np.ndarray]) -> list[Prediction]:
        """Returns a prediction for each image whose id is not -1 (padding).

        Args:
          batch: image [B, h, w, C] as `preprocess` makes it, in the config's channel order,
            padded to multiples of 32; image_size and original_size [B, 2] (height, width);
            image_id [B].
        """
        return self.finish_batch(self.start_batch(batch))

    def start_batch(self, batch: Mapping[str, np.ndarray]) -> StartedBatch:
        """Hands a batch to the devices, masks at the original size included; waits for nothing
        but a program that is not compiled yet.

        Args: see `predict_batch`.
        """
        image_ids = np.asarray(batch["image_id"])
        original_size = np.asarray(batch["original_size"], np.int32)
        wanted, is_split = image_ids != -1, self._is_split(len(image_ids))
        if self._slots and not is_split:
            shape = batch["image"].shape[:3]
            start_paste(shape, self._slots, original_size, wanted, self.mask_threshold)
        detections = self.detect(batch)
        masks = BatchPaste(
            detections,
            np.asarray(batch["image_size"], np.int32),
            original_size,
            wanted=wanted,
            threshold=self.mask_threshold,
            mesh=self.mesh if is_split else None,
        )
        return StartedBatch(detections, masks, image_ids, original_size, self.skeleton)

    def finish_batch(self, started: StartedBatch) -> list[Prediction]:
        """Returns a started batch's predictions, once; see `predict_batch`."""
        for i in started.images:
            self.report_limits(started.detections, i)
        return started.predictions(self.class_names)

    def detect(self, batch: Mapping[str, np.ndarray]) -> Detections:
        """Returns the detections of a batch's images, on the devices that computed them."""
        image_size = np.asarray(batch["image_size"], np.int32)
        programs, variables = self._programs(len(image_size))
        return programs(variables, batch["image"], image_size)

    def report_limits(self, detections: Detections, index: int) -> None:
        """Logs the limits that image `index` reaches, each once, with the key to raise.

        The number of detections counts only where the weakest has `limit_score` or more:
        then others that would be shown were cut.
        """
        if self.limit_score == math.inf:
            return
        fields = (detections.scores, detections.valid, detections.num_candidates)
        scores, valid, num_candidates = (field[index] for field in jax.device_get(fields))
        options = self.options
        reached = {
            "test.max_per_image": valid.all() and scores[-1] >= self.limit_score,
            "test.nms_pre": num_candidates > options.nms_pre,
            "test.max_candidates": num_candidates > options.max_candidates,
        }
        for key, is_reached in reached.items():
            if is_reached and key not in self._reported_limits:
                self._reported_limits.add(key)
                limit = getattr(options, key.removeprefix("test."))
                log.warning(
                    "objects may be missing: an image reaches %s (%d); raise it by --config.%s=N",
                    key,
                    limit,
                    key,
                )

    paste = staticmethod(paste_image)

    def _in_order(
        self, examples: Sequence[dict[str, np.ndarray]], batch_size: int
    ) -> Iterator[Prediction]:
        done: dict[int, Prediction] = {}
        for batch in make_batches(examples, batch_size):
            done.update({p.image_id: p for p in self.predict_batch(batch)})
        for example in examples:
            yield done.pop(int(example["image_id"]))


def build_predictor(
    config: Any,
    model: Any,
    variables: PyTree,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> Predictor:
    """Returns the predictor that a config describes: the one place that unpacks it."""
    input_ = config.input
    names = class_names or [f"class {i + 1}" for i in range(model.num_classes)]
    buckets = check_buckets(input_.buckets_test, "input.buckets_test")
    buckets = buckets or default_buckets(input_.min_size_test, input_.max_size_test)
    mean, std = input_statistics(config)
    # Of a training: heads that prediction does not compute take no memory.
    params = {k: v for k, v in variables["params"].items() if k not in AUXILIARY}
    predictor = Predictor(
        model,
        {**variables, "params": params},
        InputOptions(
            channel_order=input_.channel_order,
            mean=mean,
            std=std,
            min_size=input_.min_size_test,
            max_size=input_.max_size_test,
            buckets=buckets,
            pixels=pixel_format(config),
        ),
        DetectOptions.from_config(config),
        names,
        category_ids or range(1, len(names) + 1),
        compile_kernel_transform(model, max(buckets), jax.default_backend(), config.data.channels),
    )
    head = config.model.keypoint_head
    predictor.keypoint_names = tuple(head.names)
    predictor.skeleton = tuple(tuple(pair) for pair in head.skeleton)
    return predictor

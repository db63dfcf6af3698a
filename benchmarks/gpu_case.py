"""What both programs of gpu.py are given: sizes, weights, a batch with its targets."""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from step_case import NUM_CLASSES, make_batch, noise_variables

from solov2_jax.config import load_config, save_config
from solov2_jax.models import build_model
from solov2_jax.structs import Batch
from solov2_jax.targets import assign_targets
from solov2_jax.weights.convert import flatten_tree
from solov2_jax.weights.names import to_adelaidet

ROOT = Path(__file__).resolve().parent.parent


def make_config(path: str, tiny: bool) -> Any:
    """Returns the config; `tiny` for tests on the CPU."""
    config = load_config(str(ROOT / path), [])
    with config.unlocked():
        config.model.num_classes = config.model.num_classes or NUM_CLASSES
        if tiny:
            config.model.num_classes = 3
            config.model.backbone.depth = 18
            config.model.fpn.channels = config.model.ins_head.channels = 32
            config.model.ins_head.num_convs = 1
            config.model.ins_head.num_kernels = config.model.mask_head.channels = 32
            config.model.ins_head.num_grids = (6, 5, 4, 3, 2)
            config.targets.max_pairs = 16
    return config


def write_case(folder: Path, config: Any, batch: int, size: tuple[int, int]) -> None:
    """Writes config.json, weights.npz (AdelaiDet's names) and arrays.npz."""
    save_config(config, folder / "config.json")
    model = build_model(config, config.model.num_classes)
    np.savez(folder / "weights.npz", **to_adelaidet(dict(flatten_tree(variables(model)))))
    arrays = make_batch(batch, *size, config.model.num_classes)
    targets = config.targets
    assigned = jax.jit(
        lambda fields: assign_targets(
            Batch(**fields),
            num_grids=tuple(config.model.ins_head.num_grids),
            scale_ranges=tuple(tuple(pair) for pair in targets.scale_ranges),
            sigma=targets.sigma,
            num_classes=config.model.num_classes,
            max_pairs=targets.max_pairs,
            key=jax.random.key(0),
        )
    )(arrays)
    names = ("cate", "pair_cell", "pair_instance", "pair_weight", "num_cells")
    given = {f"target_{n}": np.asarray(getattr(assigned, n)) for n in names}
    np.savez(folder / "arrays.npz", **arrays, **given)


def variables(model: Any) -> Any:
    """Returns the weights: some hundred candidates, so that 100 masks are kept."""
    return noise_variables(model, candidates=600)


def main() -> None:
    """Writes the case that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--size", type=int, nargs=2, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    config = make_config(args.config, args.tiny)
    write_case(args.folder, config, args.batch, tuple(args.size))


if __name__ == "__main__":
    main()

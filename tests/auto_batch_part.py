"""One of several processes that choose `train.batch_size = "auto"` for a folder.

python tests/auto_batch_part.py --data DIR --workdir DIR, and the flags by which processes join.
No step is compiled: an image takes half a gigabyte, and the last process has the least memory.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from solov2_jax.config_schema import text
from solov2_jax.tools.cli import app, own_data, shared
from solov2_jax.tools.cli.flags import Flag
from solov2_jax.training import memory

GB = 2**30
WORKDIR = Flag("workdir", text(), "Folder of the run.", required=True)


def main(overrides):
    import jax

    process, count = jax.process_index(), jax.process_count()

    def compile_step(step, state, batch, shape):
        images = batch["image"].shape[0] // jax.device_count()
        return memory.StepMemory(shape, 1.0, 0.0, GB, images * GB // 2)

    memory.compile_step, memory.STEPS_PER_EPOCH = compile_step, 1
    memory.memory_limit = lambda: ((2 if process == count - 1 else 10) * GB, f"of {process}")
    config = own_data.own_config("", WORKDIR.value, overrides, write=True)
    chosen = config.train.batch_size, config.input.min_size_test, config.optim.learning_rate
    print(f"chosen: {chosen}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main, (WORKDIR, *own_data.FLAGS, *shared.PROCESSES), shared.run_joined)

"""Where arrays live: one mesh axis, "data"; batches are split, the state is copied."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from solov2_jax.distributed import put_rows
from solov2_jax.io import InputError


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh with the one axis "data" over the first devices, or over all."""
    # In the order of processes: each holds rows of the batch that follow one another.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    # JAX's default is Explicit, where contracting over the batch axis raises.
    return Mesh(np.array(devices[:num_devices]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the state: a copy on each device."""
    return NamedSharding(mesh, P())


def split_by_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over the devices."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises an InputError if the global batch cannot be split evenly.

    Args:
      microbatches: computed one after the other, each on all devices.
    """
    devices = mesh.devices.size
    divisor = devices * microbatches
    if batch_size % divisor:
        below = batch_size - batch_size % divisor
        options = [str(n) for n in (below, below + divisor) if n > 0]
        times = f" times train.accumulate = {microbatches}" if microbatches > 1 else ""
        raise InputError(
            f"train.batch_size = {batch_size} cannot be split over {devices} devices"
            f"{times}: use {' or '.join(options)}"
        )


def copy_to_all(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays and keys, equal in all processes, as copies on each device."""
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Returns a host's rows as global arrays, split over the mesh's devices."""
    sharding = split_by_batch(mesh)

    def put(array: np.ndarray) -> jax.Array:
        array = np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
        return put_rows(array, sharding)

    return {name: put(array) for name, array in batch.items()}

"""Operations with one form for CPUs and one for other platforms, and their constants.

Which form a program has is decided when it is lowered for a platform, not when it is traced:
a program that is exported for a GPU or a TPU on a machine without one has their form, and so
has one that runs on a CPU beside a GPU. `lax.platform_dependent` decides at the same time, but
puts a conditional around each form, and traces all of them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


class Tuning(NamedTuple):
    """What is computed at once, for speed; no result depends on it but by rounding."""

    # Pixels of the masks in post-processing.
    mask_pixels: int
    # Of the dice loss, over the images of one device: pairs times pixels.
    dice_logits: int
    # Of the masks at the original size that are enlarged together.
    pasted_pixels: int
    # The dice loss skips unused slots where a part of them suffices: a form for each part.
    slot_parts: tuple[float, ...]


# 7 MiB of logits for 512 masks, 16 MiB for the dice loss: a CPU's caches.
CPU = Tuning(mask_pixels=3584, dice_logits=2**22, pasted_pixels=1, slot_parts=(0.25, 0.5, 1.0))
# A launch and a wait for each tile are what costs: 512 MiB of float32 at most. All slots: a
# GPU's host reads which form is next, and can queue nothing until then. Not measured.
ACCELERATOR = Tuning(mask_pixels=2**17, dice_logits=2**27, pasted_pixels=2**24, slot_parts=(1.0,))

# Off the CPU: channels that matrix units take together, and how many more of a convolution's
# input, coordinates as one or two numbers each, are convolved by themselves.
ALIGNED_CHANNELS, MOST_COORDINATES = 64, 4

_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable_forms() -> Iterator[None]:
    """Traces every `PlatformOp` as its portable form.

    For programs that are written operation by operation: trace a function of its own inside,
    because a jitted function that was traced outside keeps its form.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


class PlatformOp:
    """An operation on pytrees of arrays whose form the platform chooses.

    Forms take the same arrays, and hashable keyword arguments, and return arrays of the same
    shapes. They have no derivative: give one by `jax.custom_vjp` around the call.

    Args:
      name: of the operation in a traced program.
      cpu, other: its forms.
      portable: the one within `portable_forms`; None: `other`.
    """

    def __init__(self, name: str, cpu: Callable, other: Callable, portable: Callable | None = None):
        self._other, self._portable = other, portable or other
        self._primitive = Primitive(name)
        self._primitive.multiple_results = True
        bind = self._primitive.bind
        compiled = jax.jit(lambda *leaves, call: bind(*leaves, call=call), static_argnames="call")
        self._primitive.def_impl(compiled)
        self._primitive.def_abstract_eval(lambda *leaves, call: call.results(other, leaves)[1])
        mlir.register_lowering(self._primitive, mlir.lower_fun(_flat(other)))
        mlir.register_lowering(self._primitive, mlir.lower_fun(_flat(cpu)), platform="cpu")
        batching.primitive_batchers[self._primitive] = self._refuse_vmap

    @classmethod
    def tuned(cls, name: str, form: Callable) -> "PlatformOp":
        """Returns the operation of one form, whose argument `tuning` is the platform's."""

        def on_cpu(*operands: Any, **static: Any) -> Any:
            return form(*operands, tuning=CPU, **static)

        def elsewhere(*operands: Any, **static: Any) -> Any:
            return form(*operands, tuning=ACCELERATOR, **static)

        return cls(name, on_cpu, elsewhere, portable=on_cpu)

    def __call__(self, *operands: Any, **static: Any) -> Any:
        """Returns the result of the platform's form."""
        if _portable.get():
            return self._portable(*operands, **static)
        leaves, tree = jax.tree.flatten(operands)
        precision = jax.config.values["jax_default_matmul_precision"]
        call = _Call(tree, tuple(sorted(static.items())), precision)
        structure, _ = call.results(self._other, tuple(jax.typeof(leaf) for leaf in leaves))
        return jax.tree.unflatten(structure, self._primitive.bind(*leaves, call=call))

    def _refuse_vmap(self, leaves: Any, axes: Any, *, call: "_Call") -> Any:
        raise NotImplementedError(f"{self._primitive.name} takes batches, not jax.vmap")


class _Call(NamedTuple):
    """What a form is called with beside arrays."""

    tree: Any  # structure of the operands
    static: tuple[tuple[str, Any], ...]
    # The default of products where the operation was called: forms are traced later.
    precision: str | None

    def of(self, form: Callable, leaves: Any) -> Any:
        with jax.default_matmul_precision(self.precision):
            return form(*jax.tree.unflatten(self.tree, leaves), **dict(self.static))

    def results(self, form: Callable, leaves: Any) -> tuple[Any, list[Any]]:
        """Returns the structure of a form's result and the types of its arrays."""
        return _results(self, form, tuple(leaves))


@functools.lru_cache(maxsize=4096)
def _results(call: _Call, form: Callable, leaves: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    traced = jax.jit(lambda *arrays: call.of(form, arrays)).trace(*leaves)
    return jax.tree.structure(traced.out_info), list(traced.jaxpr.out_avals)


def _flat(form: Callable) -> Callable:
    return lambda *leaves, call: jax.tree.leaves(call.of(form, leaves))

"""Our network cut into its parts, each compiled alone, to see where the time goes.

A part is the whole network with the outputs of the parts before it given; what its own
output does not need is dropped by the compiler. So nothing here knows how a part is
built, only what the network calls it.
"""

from typing import Any

import jax
from flax import linen as nn

from solov2_jax.inference.programs import DetectOptions
from solov2_jax.postprocess import detect
from solov2_jax.structs import Outputs

# Part -> parts whose outputs it needs.
PARTS = {
    "backbone": (),
    "fpn": ("backbone",),
    "ins_head": ("fpn",),
    "mask_head": ("fpn",),
}


def network_stages(model: nn.Module) -> dict[str, Any]:
    """Returns {part: compiled (variables, image, outputs of parts) -> output}."""
    return {name: _stage(model, name, needs) for name, needs in PARTS.items()}


def _stage(model: nn.Module, name: str, needs: tuple[str, ...]) -> Any:
    def run(variables, image, given):
        made = {}

        def intercept(call, args, kwargs, context):
            path = context.module.path
            if context.method_name != "__call__" or len(path) != 1:
                return call(*args, **kwargs)
            if path[0] in given:
                return given[path[0]]
            made[path[0]] = call(*args, **kwargs)
            return made[path[0]]

        with nn.intercept_methods(intercept):
            outputs = model.apply(variables, image)
        if name == "ins_head":
            return outputs.cate, outputs.kernel
        return outputs.mask_feat if name == "mask_head" else made[name]

    compiled = jax.jit(run)

    def stage(variables, image, given):
        return compiled(variables, image, {k: given[k] for k in needs})

    return stage


def as_outputs(parts: dict[str, Any]) -> Outputs:
    """Returns the network's outputs from those of its parts."""
    return Outputs(*parts["ins_head"], parts["mask_head"])


def detect_stage(config: Any) -> Any:
    """Returns the compiled post-processing: Outputs -> Detections."""
    grids = tuple(config.model.ins_head.num_grids)
    names = [n for n in DetectOptions.__dataclass_fields__ if n != "num_grids"]
    options = {name: getattr(config.test, name) for name in names}
    return jax.jit(lambda outputs: detect(outputs, num_grids=grids, **options))

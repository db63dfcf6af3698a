"""Weights of other programs in, ours out; no file is ever executed.

    from solov2_jax.weights import open_weights, save_weights

Start reading at `hub.py`, then `convert.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Weights": "sources:Weights",
        "check_network": "convert:check_network",
        "open_weights": "hub:open_weights",
        "read_weights": "sources:read_weights",
        "save_weights": "convert:save_weights",
    },
)

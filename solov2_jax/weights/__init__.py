"""Weights of other programs in, ours out; no file is ever executed.

    from solov2_jax.weights import open_weights, save_weights

Start reading at `hub.py`, then `convert.py`.
"""

from solov2_jax import lazy_exports

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Weights": "sources",
        "check_network": "convert",
        "open_weights": "hub",
        "read_weights": "sources",
        "save_weights": "convert",
    },
)

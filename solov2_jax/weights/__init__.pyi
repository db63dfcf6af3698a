"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.weights.convert import check_network as check_network
from solov2_jax.weights.convert import save_weights as save_weights
from solov2_jax.weights.hub import open_weights as open_weights
from solov2_jax.weights.sources import Weights as Weights
from solov2_jax.weights.sources import read_weights as read_weights

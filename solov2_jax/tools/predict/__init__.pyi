"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.tools.predict.outputs import DetectionFilter as DetectionFilter
from solov2_jax.tools.predict.predict_files import FileOptions as FileOptions
from solov2_jax.tools.predict.sources import find_files as find_files
from solov2_jax.tools.predict.sources import open_sources as open_sources

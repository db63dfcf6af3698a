"""For type checkers: what `__init__.py` imports when it is first asked for."""

from solov2_jax.tools.export.exported import (
    ExportedPredictor as ExportedPredictor,
)
from solov2_jax.tools.export.exported import (
    ExportOptions as ExportOptions,
)
from solov2_jax.tools.export.load import open_export as open_export
from solov2_jax.tools.export.run import export as export

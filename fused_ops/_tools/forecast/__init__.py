"""A forecast: how long a pass of an op takes on a GPU, from its sizes, the launches it makes and a few coefficients.

`forecast` is pure Python and needs no GPU. Every coefficient is in `gpus` (of a GPU) or `counts` (of a kernel), with where it
comes from; all are beliefs until measurements correct them. `bench forecast` writes the forecasts down before a run, and
`bench publish` puts the measured times beside them.
"""

from __future__ import annotations

from .gpus import GPUS, Gpu, gpu_named
from .model import MODEL_VERSION, Forecast, forecast, kernels_hash, variant_of

__all__ = ["GPUS", "MODEL_VERSION", "Forecast", "Gpu", "forecast", "gpu_named", "kernels_hash", "variant_of"]

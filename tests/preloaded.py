"""What the server of forked.py has imported when it forks. None of it starts a thread, beside which forking would not
be safe, and none is of this project."""

import gc
import inspect
from contextlib import suppress
from importlib import import_module

for name in (
    *("numpy", "torch.distributed.run", "safetensors.torch", "PIL.Image", "numba", "scipy.stats", "sklearn.datasets"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("pydantic.dataclasses", "psutil", "pynvml", "tqdm", "yaml", "tomli_w", "jinja2", "plotly.graph_objects"),
    *("onnxscript", "submitit"),
):
    with suppress(ImportError):  # not installed
        import_module(name)
# fills a table of all modules, which pydantic would have made in every process
inspect.getmodule(inspect.currentframe())
gc.freeze()  # else collections would copy the memory that processes share

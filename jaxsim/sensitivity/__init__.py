"""Derivatives: what comes out of a scenario, by what goes in.

    found = jaxsim.sensitivity("default", wrt=["workload.rate_rps"], of=["p99_ttft_ms"])
    found.to_frame()                               # a row a metric and field: elasticities with intervals

`fields` are the numbers that can be asked for, `metrics` what is derived; `total` takes central differences under
common random numbers, all in one batch; `tornado`, `heat_map` and `table` show them. The package itself is what users
call, so that `jaxsim.sensitivity` is one name for both.
"""

import importlib
import sys
import types
from typing import Any

_HOMES = {"Sensitivity": "jaxsim.sensitivity.total", "Row": "jaxsim.sensitivity.total"}


class _Package(types.ModuleType):
    """This package, which can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`jaxsim.sensitivity.total.sensitivity`."""
        # Loaded when called: the command line answers --help without JAX.
        return importlib.import_module("jaxsim.sensitivity.total").sensitivity(*arguments, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


sys.modules[__name__].__class__ = _Package

"""Batched, exact simulation of LLM serving systems.

`Scenario` describes a system and its workload, `simulate` runs one or many, `Result` holds what came out. `Study`
describes thousands, `sweep` runs them to a table on disk, `load` reads it,
`plot` draws it. `requirements` turns a use case into the platform it needs. `sensitivity` says what
a metric gains by every number of a scenario. `functional` is the simulator as a function
inside other JAX programs, `Environment` the same by control ticks, for what learns to route or to scale.
"""

import importlib
import os

__all__ = ["Environment", "InputError", "LaneResult", "Result", "Scenario", "Study", "environment", "functional",
           "load", "plot", "requirements", "sensitivity", "simulate", "sweep"]

_HOMES = {"Scenario": "jaxsim.spec.scenario", "simulate": "jaxsim.engine.simulate", "Result": "jaxsim.metrics",
          "LaneResult": "jaxsim.metrics", "InputError": "jaxsim._core.errors", "Study": "jaxsim.study.study",
          "sweep": "jaxsim.study.runner", "load": "jaxsim.study.results", "plot": "jaxsim.study.plots",
          "Environment": "jaxsim.engine.environment", "requirements": "jaxsim.analytic.requirements"}

_ROOT = os.path.dirname(os.path.dirname(__file__))
if os.path.isfile(os.path.join(_ROOT, "pyproject.toml")) and os.path.isdir(os.path.join(_ROOT, "kernels")):
    # Python started in a checkout finds this folder before the installed package: its parts lie beside it.
    __path__.append(_ROOT)


def __getattr__(name: str):
    # Loaded when asked for: the command line answers --help without JAX.
    if name in ("functional", "environment"):
        return importlib.import_module(f"jaxsim.engine.{name}")
    if name == "sensitivity":
        # A package that can be called.
        return importlib.import_module("jaxsim.sensitivity")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""The scheduler that a scenario names."""

import functools

from jaxsim.spec.engine import EngineConfig
from jaxsim.spec.presets import Scheduler, resolve


def scheduler_of(engine: EngineConfig) -> Scheduler:
    """The scheduler of an engine."""
    # A file may change, a name does not.
    return resolve(engine) if engine.preset.endswith(".toml") else _shipped_scheduler(engine)


@functools.lru_cache(maxsize=1024)
def _shipped_scheduler(engine: EngineConfig) -> Scheduler:
    return resolve(engine)

"""Studies: many scenarios from one file, as one table.

    study = Study.from_toml("study.toml")          # axes over the fields of a scenario
    sweep(study, "results/mine")                   # tiles of scenarios, one Parquet file each, resumable
    frame = load("results/mine")                   # a row a scenario: parameters, metrics, intervals

`expressions` and `design` make the points, `study` the scenarios; `lanes` turns them into runs that share what they
have in common, `tile` simulates them in one batch, `table` makes their metrics, `runner` keeps tiles on disk.
"""

from jaxsim.study.results import load
from jaxsim.study.runner import sweep
from jaxsim.study.study import Study

__all__ = ["Study", "load", "sweep"]

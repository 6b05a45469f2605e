"""Studies: many scenarios from one file, as one table.

    study = jaxsim.Study.from_toml("study.toml")   # axes over the fields of a scenario
    jaxsim.sweep(study, "results/mine")            # tiles of scenarios, one Parquet file each, resumable
    frame = jaxsim.load("results/mine")            # a row a scenario: parameters, metrics, intervals

`expressions` and `design` make the points, `study` the scenarios; `lanes` turns them into runs that share what they
have in common, `plan` cuts them into tiles, `tile` simulates one in one batch, `table` makes its metrics, `runner`
keeps tiles on disk, `results` joins them; `goodput` searches rates, `plots` and `report` show.
"""

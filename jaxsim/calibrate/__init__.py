"""Constants of a device's kernels from measured times: `jaxsim calibrate`.

    tables.py         reads operator tables         families.py  what the forms of `jaxsim.cost` say about their rows
    least_squares.py  bounded fits with priors      fit.py       a whole device, held out by group
    loads.py          tokens of single experts      report.py    text, JSON, TOML, plots       command.py  the command
"""

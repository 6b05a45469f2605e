"""Plan search: which way to cut a model over devices, screened in closed form, confirmed by simulation."""

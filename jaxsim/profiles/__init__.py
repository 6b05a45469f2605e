"""Measured operator profiles: one reader a published format, all to a `Profile`, and the file jaxsim keeps them in.

    profile = llmservingsim.read(dense="dense.csv", attention="attention.parquet", meta="meta.yaml")
    write(profile, "rtx_pro_6000-llama-3.1-8b.parquet")
    cost = profiled(read("rtx_pro_6000-llama-3.1-8b.parquet"), roofline(model, device), 2048, 128, 8192)

Readers: `llmservingsim`, `aiconfigurator`, `vidur`, `plain` (a documented CSV). All raise `InputError` with file, row,
value and remedy.
"""

from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.profiles import aiconfigurator, llmservingsim, plain, vidur
from jaxsim.profiles.native import read, write

READERS = {module.NAME: module for module in (aiconfigurator, llmservingsim, plain, vidur)}
"""Reader modules by format name."""

__all__ = ["OPERATORS", "READERS", "OperatorTable", "Profile", "aiconfigurator", "llmservingsim", "plain", "read",
           "vidur", "write"]

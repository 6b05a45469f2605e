"""Measured operator profiles: one reader a published format, all to a `Profile`, and the file jaxsim keeps them in.

    profile = import_profile("llmservingsim", ["dense.csv", "attention.parquet", "meta.yaml"],
                             model="llama-3.1-8b", device="rtx_pro_6000")
    write(profile, "rtx_pro_6000-llama-3.1-8b.parquet")
    cost = profiled(read("rtx_pro_6000-llama-3.1-8b.parquet"), roofline(model, device), 2048, 128, 8192)

`import_profile` is what `jaxsim import-profile` does: a reader, then checks against model and device. A scenario names
the file as `[cost] kind = "profiled"`, `path = ...`.

Readers: `llmservingsim`, `aiconfigurator`, `vidur`, `plain` (a documented CSV). All raise `InputError` with file, row,
value and remedy.
"""

from jaxsim.cost.profile import OPERATORS, OperatorTable, Profile
from jaxsim.profiles import aiconfigurator, llmservingsim, plain, vidur
from jaxsim.profiles.importing import READERS, import_profile
from jaxsim.profiles.native import read, write

__all__ = ["OPERATORS", "READERS", "OperatorTable", "Profile", "aiconfigurator", "import_profile", "llmservingsim",
           "plain", "read", "vidur", "write"]

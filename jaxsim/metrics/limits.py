"""Which requests meet their limits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from jaxsim.metrics.lane import FINISHED, STATUS_NAMES
from jaxsim.spec.scenario import SloSection
from jaxsim.spec.workload import TenantSection

NO_LIMITS = SloSection()


def limits_ms(slo: SloSection, tenants: Sequence[TenantSection] = (), names: Sequence[str] = (),
              tenant: Int[np.ndarray, " requests"] | None = None) -> dict[str, Any]:
    """Limits of ttft, tpot and e2e: a number, or one a request where tenants have their own (infinite for none), None
    where nobody has one. tenant: of each request, an index into `names`."""
    found: dict[str, Any] = {}
    for name, own, usual in (("ttft", "ttft_ms", slo.ttft_ms), ("tpot", "tpot_ms", slo.tpot_ms),
                             ("e2e", "deadline_ms", slo.e2e_ms)):
        given = {t.name: getattr(t, own) for t in tenants if getattr(t, own) is not None}
        found[name] = usual
        if given:
            missing = math.inf if usual is None else usual
            found[name] = np.array([given.get(label, missing) for label in names])[tenant]
    return found


def meets(frame: pd.DataFrame, slo: SloSection, tenants: Sequence[TenantSection] = ()
          ) -> dict[str, Bool[np.ndarray, " requests"]]:
    """Which requests meet each limit that is given, and `all` of them. An unfinished request meets none.

    tenants: classes of requests that may have limits of their own.
    """
    finished = (frame["status"] == STATUS_NAMES[FINISHED]).to_numpy()
    met = {}
    names, tenant = np.unique(frame["tenant"].to_numpy().astype(str), return_inverse=True) if tenants else ((), None)
    limits = limits_ms(slo, tenants, names, tenant)
    for name, column in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("e2e", "e2e_s")):
        limit_ms = limits[name]
        if limit_ms is not None:
            value = frame[column].to_numpy()
            # Only a one-token output is finished and without a value.
            met[name] = finished & (np.isnan(value) | (value <= limit_ms * 1e-3))
    if met:
        met["all"] = np.logical_and.reduce(list(met.values()))
    return met

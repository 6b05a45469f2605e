"""What the devices of a cluster draw, at their clocks, and cost."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsim._core.errors import InputError
from jaxsim.spec.device import DeviceSpec
from jaxsim.spec.scenario import Scenario
from jaxsim.spec.sections import DeviceSection


class Devices(NamedTuple):
    """Of every instance, how many devices it has, and what one draws (watts; NaN where not known) and costs a second.

    Instances of one rank after the other where ranks iterate together.
    """

    count: Float[np.ndarray, " instances"]
    idle_w: Float[np.ndarray, " instances"]
    busy_w: Float[np.ndarray, " instances"]
    usd_per_s: Float[np.ndarray, " instances"]


def devices_of(scenario: Scenario, num_instances: int) -> Devices:
    """The devices of the instances of a run, of pools that may differ."""
    rows = []
    pools = scenario.devices_of_pools
    # Data-parallel ranks are instances by themselves.
    ranks = num_instances / sum(replicas for *_, replicas in pools)
    for section, devices, replicas in pools:
        spec = _spec(section)
        power = (math.nan, math.nan)
        if spec is not None and spec.power:
            power = spec.power.idle_w, spec.power.at_work_w(spec.clock)
        usd_per_s = (spec.usd_per_h or math.nan) / 3600 if spec is not None else math.nan
        rows += [(devices / ranks, *power, usd_per_s)] * round(replicas * ranks)
    return Devices(*np.array(rows, np.float64).T)


def energy(devices: Devices, busy_share: Float[np.ndarray, "*runs instances"], window_s: Any, output_throughput: Any,
           on_share: Any = 1.0) -> dict[str, Any]:
    """Energy of a run, or of runs with an entry a run; NaN where the power of a device is not known.

    devices: arrays as `busy_share`, which is of the time that the devices of an instance work on an iteration.
    window_s: seconds that the energy is of. on_share: of the time, what instances are on, where they come and go: those
    that are off draw nothing; those that are down (`cluster.failures`) draw what idle ones do. mean_power_w = sum over
    instances of devices x (idle x on_share + (busy - idle) x busy_share), energy = mean_power_w x window. Source: the
    two-state form of splitwise-sim's power table; known gaps: power does not follow the batch, iterations of prompts
    alone draw more, and hosts, switches and cooling are not in it.
    """
    idle_w = devices.idle_w * np.asarray(on_share)[..., None]
    mean_power_w = np.sum(devices.count * (idle_w + (devices.busy_w - devices.idle_w) * busy_share), axis=-1)
    energy_j = mean_power_w * window_s
    tokens = np.where(np.asarray(output_throughput) > 0, output_throughput, np.nan)
    return {"mean_power_w": mean_power_w, "energy_j": energy_j, "energy_wh": energy_j / 3600,
            "energy_j_per_output_token": mean_power_w / tokens}


def _spec(device: DeviceSection | None) -> DeviceSpec | None:
    try:
        return device.spec() if device else None
    except InputError:
        # A fitted cost needs no device, so the one named may be in no catalogue.
        return None

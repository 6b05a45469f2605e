"""Workloads: arrival processes, length laws, generators, and the arrays of requests they produce."""

from jaxsim.workload.arrivals import (
    MMPP2,
    AbstractArrivals,
    Deterministic,
    Gamma,
    Modulated,
    Poisson,
    Replay,
    Weibull,
    arrival_times,
    round_to_grid,
)
from jaxsim.workload.azure2023 import azure_conv_2023
from jaxsim.workload.generator import Generator, Tenant
from jaxsim.workload.lengths import (
    AbstractLength,
    AbstractLengths,
    Fixed,
    GaussianCopula,
    Independent,
    LogNormal,
    LogNormalMixture,
    Paired,
    Quantiles,
    Samples,
    Uniform,
)
from jaxsim.workload.named import arrival_process, fixed_lengths, generator, length_law
from jaxsim.workload.streams import Stream, routing_uniforms, stream_key
from jaxsim.workload.workload import Workload

__all__ = [
    "MMPP2",
    "AbstractArrivals",
    "AbstractLength",
    "AbstractLengths",
    "Deterministic",
    "Fixed",
    "Gamma",
    "GaussianCopula",
    "Generator",
    "Independent",
    "LogNormal",
    "LogNormalMixture",
    "Modulated",
    "Paired",
    "Poisson",
    "Quantiles",
    "Replay",
    "Samples",
    "Stream",
    "Tenant",
    "Uniform",
    "Weibull",
    "Workload",
    "arrival_process",
    "arrival_times",
    "azure_conv_2023",
    "fixed_lengths",
    "generator",
    "length_law",
    "round_to_grid",
    "routing_uniforms",
    "stream_key",
]

"""The default workload: numbers fitted to one hour of conversation requests of a large cloud (2023).

19,366 requests in 3,502 s, a service's whole traffic. Arrivals are near-Poisson around a slow drift; lengths
are piled up around prompt templates and answer limits (inputs near 200, 400 and 1,000 to 1,200 tokens, a
cliff at 4,100; outputs near 100 and 400), so they are kept as 64-point quantile tables: two log-normals miss
the input law by 0.15 in KS distance. `docs/workloads.md` gives the errors of the fit, and
`jaxsim.workload.fit` redoes it.

Source: fitted to AzureLLMInferenceTrace_conv of Azure/AzurePublicDataset (CC-BY-4.0), Patel et al.,
"Splitwise", ISCA 2024.

Known gaps: the mix of lengths does not drift with the hour; dependence of output on input is one rank
correlation (0.07), where the trace bends (rank correlation +0.07, linear correlation -0.11); no sessions or
shared prefixes.
"""

from jaxsim.workload.arrivals import Gamma, Modulated
from jaxsim.workload.fit import TABLE_LEVELS
from jaxsim.workload.generator import Generator
from jaxsim.workload.lengths import GaussianCopula, Quantiles

RATE_RPS = 5.5301
NUM_REQUESTS = 19366
GAP_CV = 1.0487
SPEARMAN = 0.0728

# Relative rate at 25 equally spaced moments of the hour.
DRIFT = (
    0.4219,
    1.0641,
    0.8952,
    0.8081,
    0.9042,
    1.0075,
    0.8632,
    0.8862,
    1.0403,
    1.1472,
    1.1686,
    1.3462,
    1.3932,
    1.4720,
    1.1819,
    1.3451,
    0.8481,
    1.0868,
    0.9917,
    1.0876,
    0.6084,
    0.8666,
    0.7359,
    0.8098,
    0.4619,
)

# Tokens at the levels fit.TABLE_LEVELS.
INPUT_TOKENS = (
    2,
    8,
    10,
    16.8,
    29,
    91,
    181,
    191,
    201,
    207,
    222,
    317,
    375,
    381,
    387,
    392,
    395,
    398,
    400,
    403,
    406,
    411,
    419,
    433,
    703,
    903,
    971.6,
    994,
    1009,
    1020,
    1031,
    1041,
    1050,
    1060,
    1071,
    1081,
    1092,
    1102,
    1116,
    1130,
    1147,
    1171,
    1214.4,
    1311,
    1315,
    1368.3,
    1689.2,
    2032,
    2401.2,
    2734.5,
    4073,
    4079,
    4086,
    4098,
    4110,
    4123,
    4142,
    4178.8,
    4831,
    5404.5,
    6179.1,
    6570.1,
    7111.6,
    14050,
)
OUTPUT_TOKENS = (
    7,
    12,
    12,
    14,
    16,
    24,
    38,
    44,
    49,
    54,
    59,
    64,
    69,
    73,
    77,
    81,
    84,
    86,
    89,
    91,
    93,
    95,
    97,
    100,
    103,
    107,
    110,
    116,
    122,
    129,
    137,
    145,
    156,
    163,
    177,
    190,
    216,
    237,
    375,
    384,
    390,
    394,
    396,
    397,
    400,
    404,
    410,
    414,
    417,
    424,
    429,
    442,
    468,
    540,
    571,
    589,
    601,
    617,
    643.2,
    718.8,
    954,
    1000,
    1000,
    1000,
)


def azure_conv_2023(rate_rps: float = RATE_RPS) -> Generator:
    """Generator fitted to the Azure 2023 conversation trace, at its own or another rate.

    The drift keeps its number of requests: at twice the rate the hour's pattern takes half an hour.
    """
    return Generator(
        arrivals=Modulated(Gamma(GAP_CV), DRIFT, float(NUM_REQUESTS)),
        lengths=GaussianCopula(
            Quantiles(TABLE_LEVELS, INPUT_TOKENS), Quantiles(TABLE_LEVELS, OUTPUT_TOKENS), SPEARMAN
        ),
        rate_rps=rate_rps,
        name="azure-conv-2023",
    )

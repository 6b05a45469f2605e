"""The analytic fidelity: steady states in closed form over the cost model that the event engine charges.

    executor, load = of_scenario(scenario)
    state = steady_state(executor, load)            # TPOT, TTFT, batch, utilisation, capacity
    jax.grad(lambda x: steady_state(executor, load.at_rate(x)).tpot_s)(4.0)

No loop over time and no random draw: every number is traced, so all of it can be jitted, vmapped and differentiated.
"""

from jaxsim.analytic.deployment import Deployment, Measures, deployment
from jaxsim.analytic.lower import of_scenario
from jaxsim.analytic.steady import Executor, Steady, capacity_rps, highest_rate, steady_state, steady_states
from jaxsim.analytic.workload import Load, load_of

__all__ = ["Deployment", "Executor", "Load", "Measures", "Steady", "capacity_rps", "deployment", "highest_rate",
           "load_of", "of_scenario", "steady_state", "steady_states"]

"""Rules between the fields of a scenario, and between a scenario and its model and device."""

from typing import TYPE_CHECKING

from jaxsim.spec.rules.cluster import (
    check_failures,
    check_migration,
    check_pools,
    check_role_switching,
    check_variants,
)
from jaxsim.spec.rules.engine import check_engine, check_system
from jaxsim.spec.rules.hybrid import check_hybrid
from jaxsim.spec.rules.links import check_links
from jaxsim.spec.rules.long_contexts import check_long_contexts
from jaxsim.spec.rules.partial_prefills import check_partial_prefills
from jaxsim.spec.rules.sizes import check_sizes
from jaxsim.spec.rules.workload import check_clients, check_images, check_workload

if TYPE_CHECKING:
    from jaxsim.spec.scenario import Scenario


def check(s: "Scenario") -> None:
    """Raises `InputError` for the first rule that a scenario breaks."""
    check_engine(s)
    check_system(s)
    check_hybrid(s)
    check_long_contexts(s)
    check_partial_prefills(s)
    check_pools(s)
    check_links(s)
    check_role_switching(s)
    check_migration(s)
    check_variants(s)
    check_workload(s)
    check_clients(s)
    check_failures(s)
    check_images(s)
    check_sizes(s)

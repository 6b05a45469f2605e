"""Policies: batching (who runs in the next iteration) and routing (where a request goes)."""

from jaxsim.policy import cache_routing as cache_routing

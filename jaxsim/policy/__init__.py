"""Policies: batching (who runs in the next iteration) and routing (where a request goes)."""

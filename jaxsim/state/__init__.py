"""The loop's carry, and the device form of a workload."""

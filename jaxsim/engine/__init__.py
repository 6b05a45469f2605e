"""The event engine: one step of one scenario, the loop around it, and simulate()."""

"""Seconds of an iteration: the interface and its implementations."""

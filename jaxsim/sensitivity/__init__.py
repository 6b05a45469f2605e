"""Sensitivity: what limits a system, and how much each unit of anything is worth (docs/sensitivity.md)."""

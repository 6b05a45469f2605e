"""Batched simulation of LLM serving systems."""

"""JAX's switch between 32 and 64 bits, where this version of it has it."""

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

__all__ = ["enable_x64"]

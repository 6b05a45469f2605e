"""How fast jaxsim is: `engine` measures the compiled loop, `sweeps` whole studies. Nothing here asserts a time."""

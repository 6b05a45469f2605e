"""Fixed-shape data structures and numerics the engine is built of; nothing here knows about serving."""

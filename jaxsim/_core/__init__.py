"""Ground floor: errors and small helpers that everything above may use."""

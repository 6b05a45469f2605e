"""What limits a system, and how much each unit of it is worth: derivatives of simulated metrics."""

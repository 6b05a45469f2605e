"""Results out: files, tables, plots and timelines."""

"""What results mean: verdicts, tables, plots."""

"""Commands that print a table and write JSON to benchmarks/results/: every figure's source."""

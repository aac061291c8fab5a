"""Commands that print a table and write JSON to benchmarks/results/: where every figure comes from."""

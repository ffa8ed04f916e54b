"""One device or many: ranks, sharding, compilation, recomputation, graphs, fp8, memory. It parses no flag."""

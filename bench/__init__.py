"""Side-by-side benchmarks: our ops against what people use now, and against the hardware's limit.

bench/README.md explains the method. `make bench`, `pytest bench --benchmark-json=FILE`, `bench/gpu.sh OUT`,
`python -m bench --help`.
"""

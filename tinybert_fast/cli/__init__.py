"""The command line: arguments in, tables out. The work lives in training and benchmarks."""

"""The command line: arguments in, tables out. What the commands do lives in training and benchmarks."""

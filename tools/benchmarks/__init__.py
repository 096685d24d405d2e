"""What `tools.benchmark` measures: one module a suite, each with `run(bench)`."""

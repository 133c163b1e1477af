"""deqcore measured beside the libraries that people use today: `python -m benchmarks --help`."""

"""Run the conformance suite and the workers in separate processes."""

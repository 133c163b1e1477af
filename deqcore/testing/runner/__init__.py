"""Run the conformance suite and the workers in processes of their own."""

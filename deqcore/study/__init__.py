"""The proof-of-concept runner: train the same model under several strategies, measure, compare, report.

Read `settings.py` (what may be asked for), `grid.py` (what it means), `trainer.py` (what a backend must offer) and
`loop.py` (how one cell is trained and measured). Models and batches are made once, in NumPy, so that all backends
and strategies start from the same numbers and see the same samples.
"""

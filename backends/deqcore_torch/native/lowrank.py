"""Products with estimates of low rank, sample by sample: a history comes from memory once, then from the cache."""

from __future__ import annotations

import numpy as np

from deqcore_torch.native.kernels import _add, _combined, _dot, _products, _slots, compiled


@compiled
def corrected(v, basis, per_chunk, used, seen, left, right, out, start, stop):
    """Write v + Q Σ_j r_j (l_jᵀ Qᵀ v) of each sample; left and right `(m, batch, m)` are the only chunks."""
    slots = np.empty(seen.shape[1], np.int64)
    products, coefficients = np.empty(seen.shape[1]), np.empty(seen.shape[1])
    for b in range(start, stop):
        count = _slots(seen[b], used, slots)
        _products(basis, per_chunk, slots, count, v[b], b, v, products)
        coefficients[:] = 0.0
        for i in range(count):
            k = slots[i]
            _add(_dot(left[k, b, :used], products[:used]), right[k, b, :used], coefficients[:used])
        _combined(basis, per_chunk, slots, count, coefficients, v[b], b, v, out[b])

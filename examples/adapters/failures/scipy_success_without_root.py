"""scipy.optimize.root(method="broyden1" or "anderson") reports success for z + 1 − z = 0, which has no root."""

import numpy as np
import scipy
from scipy.optimize import root

print("scipy", scipy.__version__)
for method in ("broyden1", "anderson"):
    with np.errstate(all="ignore"):
        result = root(lambda z: (z + 1.0) - z, np.zeros(2), method=method, tol=1e-6, options={"maxiter": 300})
    print(f"{method}: success={result.success}, x={result.x}, nit={result.nit}")
# The residual is 1 for every z. At |z| > 1e16 it rounds to 0, and that is where the iterate has jumped to.

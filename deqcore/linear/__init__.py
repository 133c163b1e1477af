"""Matrix-free linear algebra: estimates of the inverse Jacobian, and GMRES."""

"""The way of one call: resolve, flatten, iterate, stop."""

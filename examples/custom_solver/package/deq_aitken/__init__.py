"""The Aitken solver as a package."""

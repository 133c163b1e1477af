"""Sinks that ship with deqcore, one file each. They import what they need when they are opened."""

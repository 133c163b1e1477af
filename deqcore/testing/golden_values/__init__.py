"""Stored solutions of the golden problems, and the script that makes them."""

"""The log that the sink `jsonl` writes: its format, safe appending, and reading."""

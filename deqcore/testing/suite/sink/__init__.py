"""What every sink of the monitor must satisfy."""

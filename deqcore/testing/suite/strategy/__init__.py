"""What every backward strategy must satisfy."""

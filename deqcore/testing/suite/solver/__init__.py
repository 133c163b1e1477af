"""What every solver must satisfy."""

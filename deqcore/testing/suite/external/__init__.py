"""What a solver that another library runs from start to end must satisfy."""

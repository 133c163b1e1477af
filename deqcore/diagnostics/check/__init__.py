"""`check_layer`: is what a trained layer returns an equilibrium, and is its gradient right?"""

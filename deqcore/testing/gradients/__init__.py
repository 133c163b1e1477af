"""`deqcore check gradients`: run it, compare the results, print them."""

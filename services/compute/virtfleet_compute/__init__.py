"""The compute service of a node: domains, their consoles and counters, and the drivers that run them."""

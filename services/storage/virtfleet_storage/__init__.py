"""The storage service of a node: pools, volumes, and who holds them."""

"""A node's services in one process and one event loop: less memory, for small nodes and large test fleets."""

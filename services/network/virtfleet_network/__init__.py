"""The network service of a node: networks, ports and leases."""

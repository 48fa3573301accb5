"""The network service of a node: networks, ports and leases."""

# First of all: it tells gRPC, before that is imported, to leave the children alone that run tools.
import virtfleet_service  # noqa: F401

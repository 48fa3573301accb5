"""The compute service of a node: domains, their consoles and counters, and the drivers that run them."""

# First of all: it tells gRPC, before that is imported, to leave the children alone that run tools.
import virtfleet_service  # noqa: F401

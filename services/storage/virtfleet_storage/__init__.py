"""The storage service of a node: pools, volumes, and who holds them."""

# First of all: it tells gRPC, before that is imported, to leave the children alone that run tools.
import virtfleet_service  # noqa: F401

"""The gateway of virtfleet: routes node calls by name and forwards their bytes; answers for the fleet as a whole."""

# First of all: it tells gRPC, before that is imported, to leave the children alone that run tools.
import virtfleet_service  # noqa: F401

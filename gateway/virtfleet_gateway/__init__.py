"""The gateway of virtfleet: authenticates, routes node calls by name and forwards their bytes; answers for the fleet as a whole."""

"""The gateway of virtfleet: routes node calls by name and forwards their bytes; answers for the fleet as a whole."""

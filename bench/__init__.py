"""The figures of virtfleet: `make bench`."""

"""The `virtfleet` command."""

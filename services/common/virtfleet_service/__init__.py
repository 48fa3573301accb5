"""What every virtfleet server process shares; no resource of its own."""

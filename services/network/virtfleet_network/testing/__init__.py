"""What back ends outside the tree import to be tested as those inside are."""

"""The contract of drivers as checks that any driver, in this tree or outside of it, can be held against."""

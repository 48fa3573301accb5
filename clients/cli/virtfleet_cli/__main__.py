"""`python -m virtfleet_cli` is the `virtfleet` command."""

from virtfleet_cli.app import main

if __name__ == "__main__":
    main()

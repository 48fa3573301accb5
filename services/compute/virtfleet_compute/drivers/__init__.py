"""Drivers: the code for each hypervisor. `api` is what they promise, `registry` the table of them."""

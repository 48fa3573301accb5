"""Kinds of pools: what a service asks of one (`api`), the table of them (`registry`), and one folder each."""

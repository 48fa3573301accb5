"""The fleet that other programs are tried against: the same as in the tests of the fleet."""

from __future__ import annotations

from tests.fleet.conftest import environment, fleet, made_whole, nodes, run_folder

__all__ = ["environment", "fleet", "made_whole", "nodes", "run_folder"]

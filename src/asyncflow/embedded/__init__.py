"""
The PostgreSQL that AsyncFlow brings along: `asyncflow dev` and the tests need none installed.

`cluster` runs one server in one folder; `account` finds the operating system user it
runs as, which matters only for root. What is stored in it belongs to `asyncflow.store`.
"""

from asyncflow.embedded.cluster import Cluster, program_path

__all__ = ["Cluster", "program_path"]

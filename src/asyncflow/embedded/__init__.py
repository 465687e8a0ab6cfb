"""
The embedded PostgreSQL: `asyncflow dev` and the tests need no installed server.

`cluster` runs one server in one folder; `account` finds the operating system user it
runs as, which matters only for root. The schema belongs to `asyncflow.store`.
"""

from asyncflow.embedded.cluster import Cluster, program_path

__all__ = ["Cluster", "program_path"]

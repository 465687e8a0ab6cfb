"""
Alembic's entry: runs the migrations on the connection that `migrate` hands over.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="schema_version",
    version_table_schema="asyncflow",
)
context.run_migrations()

"""
The real PostgreSQL and RabbitMQ that the tests run against; fixtures are in `conftest`.
"""

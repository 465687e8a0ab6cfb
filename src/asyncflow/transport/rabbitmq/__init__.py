"""
Tasks through RabbitMQ: only ids travel, and `transport` claims them.

The relay shares `topology`, `ownership`, `message`, `queue_backoff` and `diagnosis`.
"""

"""
Deliveries through RabbitMQ: only ids travel, and `transport` claims them.
"""

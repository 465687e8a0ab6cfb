"""
Sends hints of admissible tasks to RabbitMQ; `relay` is the round, the rest serves it.
"""

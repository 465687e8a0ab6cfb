"""
Sends hints of admissible tasks to RabbitMQ.

`relay` is the process: connection, leadership, one round. Each mechanism that a round uses has a
file of its own: `window` (how many hints, in what packs, how soon again), `sending`, `in_flight`,
`lost`, `dropped` and `trouble`.
"""

"""
One router per resource, and the one endpoint that is too hot for a router.

    submissions   POST /tasks
    batches       POST /tasks/batch
    tasks         read, list, cancel, run now, redrive
    health        live and ready
    docs/         the API reference, and the meaning of problem types
"""

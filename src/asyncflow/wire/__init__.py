"""
The JSON that travels over HTTP, as Pydantic models that the API and the SDK share.

    fields        names, statuses and times, as every resource writes them
    submissions   a task to run, and a task that is stored
    batches       tasks submitted together
    tasks         a task and its attempts; lists of tasks
    problems      why a request was refused (RFC 9457)
    health        the probes

A model holds only rules that a document can break by itself. What needs the database or a
handler's schema is in `api`; how bytes become values is `jsontext`.

Times are RFC 3339: any offset is accepted, and UTC with `Z` and microseconds is returned.
Durations are in seconds, as their names say.
"""

"""
HTTP in and out: bytes become `wire` models, errors become problem documents.

    app            puts the pieces together
    front/         what every request passes, whatever its route
    routes/        one router per resource, and POST /tasks
    dependencies   what routes are given
    submissions    from a submission to a stored task
    catalogue      what workers published about their handlers
    body           the body of a request: its type, and reading it
    batch          a batch's tasks, and the errors of each
    field_errors   errors of Pydantic and JSON Schema as sentences with pointers
    problems       the kinds of problems, and RFC 9457 documents of them
    views          rows as `wire` models
    openapi        the description of it all, with `examples`

No SQL and no policy: those are `store` and `domain`.
"""

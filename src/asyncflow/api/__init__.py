"""
HTTP in and out: bytes become `wire` models, errors become problem documents.

    app           puts the pieces together
    submissions   POST /tasks and POST /tasks/batch
    tasks         read, list, cancel, run now, redrive
    health        live and ready
    catalogue     what workers published about their handlers
    protocol      uvicorn's HTTP protocol with bounds, one reading of every request, and problems
    head          what must hold for the head of a request
    body          the bytes of a request: type, size, patience
    batch         a batch's tasks, and what is wrong with which
    jsontext   bytes to values, refusing what could not be stored
    field_errors  Pydantic's and JSON Schema's errors as sentences with pointers
    problems      every error as an RFC 9457 document
    views         rows as `wire` models
    gate          who may ask: the server's names, other sites' pages
    guard         the outermost layer: headers, HEAD, the last resort for errors
    cors          what browsers are told about pages of other origins
    openapi       the description of it all, with `examples`
    docs/         the page that shows it

No SQL and no policy: those are `store` and `domain`.
"""

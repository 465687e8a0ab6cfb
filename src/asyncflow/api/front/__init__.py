"""
What holds for every request, whatever its route: ASGI steps, listed in `app`.

    root_path        the path under which a proxy serves the API
    cors             what browsers are told about pages of other origins
    answers          HEAD, the headers of every response, errors as problem documents
    limits           how large a body may be, and how long it may take to arrive
    gate             the `Host` and `Origin` headers that are accepted
    authentication   who sends the request

Before a request reaches them, it passes uvicorn's HTTP protocol with our additions:

    protocol         limits of heads and connections, one reading of every request
    head             the rules for the head of a request
    writes           a transport that sends together what is written together
"""

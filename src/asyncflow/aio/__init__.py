"""
What asyncio leaves to its users: natural batches (`batching`), waits with a limit and delays
between tries (`waiting`), tasks that belong to an owner (`background`).
"""

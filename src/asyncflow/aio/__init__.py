"""
What asyncio leaves to its users: work in natural batches.
"""

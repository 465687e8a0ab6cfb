"""
`python -m asyncflow` is `asyncflow`.
"""

from asyncflow.cli import main

main()

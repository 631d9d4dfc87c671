"""Generated faults in the trainer's source, and who sees each: a claim, a unit test, or nobody.

``python -m mutants`` (with ``tests/support`` on PYTHONPATH) or ``nox -s mutants``. It is a tool of development and no
part of what is installed.
"""

"""Benchmarks: lookup layers and networks against the dense engines a user would pick instead.

``cpu``, ``gpu`` and ``accuracy`` by what is measured; beside them what they share: networks, settings, jobs in processes of their own.
May import every room but ``cli``. Nothing that serves a model imports it: the package works without this folder.
"""

import preloaded  # noqa: F401

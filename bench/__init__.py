import extras.threads  # noqa: F401  before torch

import nanochat  # noqa: F401 - Ctrl-C while a script is loaded

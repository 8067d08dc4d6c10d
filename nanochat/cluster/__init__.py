"""Several hosts: nodes, preflight, watchdog, stragglers."""

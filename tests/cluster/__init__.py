"""Several hosts on one machine, out of Linux namespaces, for tests and benchmarks that need a network between ranks."""

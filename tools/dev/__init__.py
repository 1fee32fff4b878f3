"""`make run`: the service, a PostgreSQL of its own and mock providers."""

"""Everything that the service keeps in PostgreSQL."""

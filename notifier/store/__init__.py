"""Everything that is in PostgreSQL."""

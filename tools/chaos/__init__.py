"""`make chaos`: check invariants under load while everything around the service fails."""

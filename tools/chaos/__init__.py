"""`make chaos`: what holds while everything around the service fails, under load."""

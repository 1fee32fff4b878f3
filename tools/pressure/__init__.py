"""`make pressure`: what silent and greedy callers, and shortages of the machine, cost others."""

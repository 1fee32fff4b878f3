"""`make bench`: what the service costs, beside stacks that do the same with less care."""

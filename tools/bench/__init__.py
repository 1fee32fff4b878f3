"""`make bench`: the cost of the service compared with simpler stacks that do the same."""

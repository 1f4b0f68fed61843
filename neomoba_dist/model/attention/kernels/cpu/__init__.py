"""MoBA on a CPU."""

"""Training: engines, the loop, schedules, phases, the run log."""

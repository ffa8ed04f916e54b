"""Updates that lose nothing: optimizers on exact master weights, the schedule, clipping."""

"""What the loop is handed and what it measures: stage, progress, batches, figures."""

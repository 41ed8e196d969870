"""What is measured: bits per byte, tasks, lm-evaluation-harness, cost."""

"""What scripts/soak.py asks, whom, and what it then measures."""

"""What scripts/fuzz.py feeds, with what, and what must hold then."""

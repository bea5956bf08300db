"""Token ids → text, the thinking kept apart."""

"""Untrusted bytes → RGB pictures."""

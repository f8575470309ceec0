"""Demonstrations in LIBERO's simulator."""

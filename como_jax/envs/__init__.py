"""Environments behind one interface, gymnasium's: reset with an instruction, step, success, render."""

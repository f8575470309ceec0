"""Simulators behind one interface: reset with a seed, an instruction, step, success, images."""
